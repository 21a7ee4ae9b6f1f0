"""Training hooks: reproducible steps, averaged weights, pictures, and what to say about a NaN."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unseg.data.sampling import seed_rng
from unseg.engine.drawing import draw_instances, side_by_side

logger = logging.getLogger(__name__)

_MAX_DRAWN = 100  # predictions of a picture; a proposal method gives a thousand


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def let_idle_parameters_rest(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on parameters that a model's last training step had no use for stay as they are.

    A model that trains its parts in turns names them by ``idle_parameters()``. Their gradients are
    zeros then, which distributed training needs, but with which momentum and weight decay would
    still move them. So the optimizer does not see them in its step; their momentum waits. (To take
    their gradients away is not enough: clipping by value fails on parameters that have none.)

    Args:
        optimizer: of the model's parameters.
        model: if neither it nor a part of it has such a method, nothing is changed.
    """
    sources = [m for m in unwrap(model).modules() if hasattr(m, "idle_parameters")]
    if not sources:
        return
    complete: list[list[nn.Parameter]] = []

    def hide(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        idle = {p for module in sources for p in module.idle_parameters()}
        if complete or not idle:  # torch calls hooks once per class whose step is overridden
            return
        for group in optimizer.param_groups:
            complete.append(group["params"])
            group["params"] = [p for p in group["params"] if p not in idle]

    def show(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group, parameters in zip(optimizer.param_groups, complete):
            group["params"] = parameters
        complete.clear()

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(show)


class StepSeeds(HookBase):
    """Seeds the global generators before each step from (seed, iteration, rank).

    What a step draws (sampled proposals, dropout) is then the same after a kill and resume, and
    whatever evaluation ran in between, without saving any generator's state.
    """

    def before_step(self) -> None:
        seed_rng(self.trainer.seed, self.trainer.iter, comm.get_rank())


class EMAHook(HookBase):
    """Exponential moving average of parameters and floating-point buffers.

    ``average <- decay * average + (1 - decay) * value`` after every step, all tensors in a few
    kernels. Integer buffers are copied. The average is part of the trainer's checkpoints; after
    the last step it is also written as ``ema/model_final.pth``, to be used like any weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: the model being trained.
            decay: in [0, 1).

        Raises:
            ValueError: the decay is out of range.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY must be in [0, 1), got {decay}")
        self.model = unwrap(model)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self._update = get_ema_multi_avg_fn(decay)
        self._loaded = False

    def before_train(self) -> None:
        # The weights were loaded after this hook was made; a resumed run may hold no average.
        if not self._loaded:
            if self.trainer.start_iter > 0:
                logger.info("the checkpoint holds no average of the weights: it starts from them")
            self.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def after_step(self) -> None:
        values = self.model.state_dict()
        floating = [k for k, v in values.items() if v.is_floating_point()]
        self._update([self.average[k] for k in floating], [values[k] for k in floating], None)
        for key in values.keys() - set(floating):
            self.average[key].copy_(values[key])

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter - 1 and comm.is_main_process():
            self.trainer.checkpointer.save_weights("ema/model_final", self.average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the block."""
        kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for key, value in self.average.items():
            value.copy_(state[key])
        self._loaded = True


def averaged_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The average that :class:`EMAHook` left in a checkpoint of the trainer, or None."""
    hooks = checkpoint.get("trainer", {}).get("hooks", {})
    return hooks.get(EMAHook.__qualname__)


class BatchWatch:
    """Remembers the last training batch and its losses, for reports and pictures.

    Costs nothing: the inputs are kept by reference and the losses stay where they are.
    """

    def __init__(self, model: nn.Module):
        self.inputs: list[dict[str, Any]] = []
        self.losses: dict[str, Tensor] = {}
        model.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training and isinstance(output, dict) and args:
            self.inputs = args[0]
            self.losses = {k: v.detach() for k, v in output.items() if isinstance(v, Tensor)}

    def non_finite(self) -> list[str]:
        """Names of this rank's losses that are NaN or infinite."""
        return [k for k, v in self.losses.items() if not bool(v.isfinite().all())]

    def report(self, iteration: int) -> str:
        """Which loss terms are not finite, and on which images."""
        terms = {k: float(v) for k, v in self.losses.items()}
        bad = self.non_finite()
        where = f"iteration {iteration}, rank {comm.get_rank()}"
        if not bad:
            return (
                f"the total loss is not finite at {where}, but this rank's terms are: {terms}; "
                "see the logs of the other ranks"
            )
        images = [
            f"{x.get('image_id', '?')} ({x.get('file_name', 'no file name')})" for x in self.inputs
        ]
        return (
            f"{', '.join(bad)} not finite at {where}. All terms: {terms}. Images of the batch: "
            f"{', '.join(images)}. A lower SOLVER.BASE_LR, a longer warm-up or "
            "SOLVER.CLIP_GRADIENTS often helps; if it recurs on one image, look at its annotations."
        )


class TrainingPictures(HookBase):
    """TensorBoard images of the masks trained on beside those predicted, every `period` steps."""

    def __init__(self, watch: BatchWatch, period: int, score_threshold: float = 0.3):
        """
        Args:
            watch: holds the last batch; its first image is drawn.
            period: steps between pictures.
            score_threshold: predictions below it are not drawn.
        """
        self.watch = watch
        self.period = period
        self.score_threshold = score_threshold

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period or not self.watch.inputs:
            return
        x = self.watch.inputs[0]
        if "instances" not in x:
            return
        image = self._rgb(x["image"])
        drawn = draw_instances(image, _masks(x["instances"], "gt_masks"))
        predicted = draw_instances(image, self._predict(x))
        picture = side_by_side([image, drawn, predicted])
        self.trainer.storage.put_image(
            "image | masks trained on | prediction", picture.transpose(2, 0, 1)
        )

    @torch.no_grad()
    def _predict(self, x: dict[str, Any]) -> np.ndarray:
        model = unwrap(self.trainer.model)
        with inference_context(model):
            output = model([{"image": x["image"]}])[0]
        instances = output.get("instances")
        if instances is None or not instances.has("pred_masks"):
            return np.zeros((0, *x["image"].shape[1:]), dtype=bool)
        shown = (instances.scores >= self.score_threshold).nonzero()[:, 0]
        best = torch.argsort(instances.scores[shown], descending=True, stable=True)
        return _masks(instances[shown[best[:_MAX_DRAWN]]], "pred_masks")

    def _rgb(self, image: Tensor) -> np.ndarray:
        array = image.permute(1, 2, 0).byte().cpu().numpy()
        return array[:, :, ::-1] if self.trainer.cfg.INPUT.FORMAT == "BGR" else array


def _masks(instances: Instances, field: str) -> np.ndarray:
    """(N, H, W) bool of a field with bit masks, masks of windows or a mask tensor."""
    if not instances.has(field):
        return np.zeros((0, *instances.image_size), dtype=bool)
    masks = instances.get(field)
    return (masks if isinstance(masks, Tensor) else masks.tensor).cpu().numpy().astype(bool)
