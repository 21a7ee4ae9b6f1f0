"""The trainer behind every project: Detectron2's, made reproducible and explicit about failure."""

import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer
from unseg.data import build_test_loader, build_train_loader
from unseg.data.sampling import ResumableLoader
from unseg.engine.clusters import attach_clusters
from unseg.engine.crop_weights import load_crop_weights
from unseg.engine.exemplars import ExemplarHook, attach_exemplars
from unseg.engine.hooks import (
    BatchWatch,
    EMAHook,
    StepSeeds,
    TrainingPictures,
    let_idle_parameters_rest,
    unwrap,
)
from unseg.engine.optimizer import build_optimizer
from unseg.evaluation import build_evaluator

logger = logging.getLogger(__name__)

_INSTEAD = "train without --resume and pass the file as MODEL.WEIGHTS"


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with `unseg`'s loaders, evaluators, optimizer and checkpoints.

    A run is a function of its config, seed and number of processes: it may be killed at any moment
    and resumed, and goes on as if nothing had happened (bit by bit on the CPU). With ``SEED`` -1
    a seed is drawn and kept in the checkpoints.
    """

    @property
    def seed(self) -> int:
        """The seed of data order, augmentation and steps."""
        return self.data_loader.seed

    # What Detectron2 asks a trainer to build.

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        # Our pictures replace those that Detectron2's models draw at VIS_PERIOD: one TensorBoard
        # entry per sampled mask, kept for ever on ranks that have no writer.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.VIS_PERIOD = 0
        model = super().build_model(cfg)
        attach_clusters(model, cfg)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase]:
        # Detectron2 calls this at the end of its constructor: the hooks must see our checkpointer.
        self.checkpointer = SafeCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self._watch = BatchWatch(self.model)
        self._ema = None
        self._restored = False
        let_idle_parameters_rest(self._trainer.optimizer, self.model)
        own: list[HookBase] = [StepSeeds()]
        head = attach_exemplars(unwrap(self.model), self.cfg)
        if head is not None:
            own.append(ExemplarHook(head))
        if self.cfg.SOLVER.EMA.ENABLED:
            # Before Detectron2's hooks, so that checkpoints hold the average after their step.
            self._ema = EMAHook(self.model, self.cfg.SOLVER.EMA.DECAY)
            own.append(self._ema)
            # Detectron2's evaluation hook calls self.test: let it see the averaged weights.
            self.test = self._test_averaged
        if self.cfg.VIS_PERIOD > 0 and comm.is_main_process():
            own.append(TrainingPictures(self._watch, self.cfg.VIS_PERIOD))
        return own + super().build_hooks()

    def _test_averaged(self, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        with self._ema.applied():
            return type(self).test(cfg, model)

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a resumed run goes on with the data its checkpoint would have seen.

        Raises:
            CheckpointError: there is a checkpoint to resume from, and it cannot be.
        """
        if not (resume and self.checkpointer.has_checkpoint()):
            load_crop_weights(unwrap(self.model), self.cfg)
        super().resume_or_load(resume)
        if resume and self.checkpointer.has_checkpoint() and not self._restored:
            raise CheckpointError(f"the last checkpoint holds weights alone: {_INSTEAD}")
        if not self._restored:
            # A warm-up inside a model begins with the training, whatever its weights went through.
            for module in unwrap(self.model).modules():
                if hasattr(module, "reset_schedule"):
                    module.reset_schedule()
        self.data_loader.start_iteration = self.start_iter

    def run_step(self) -> None:
        """One step.

        Raises:
            FloatingPointError: a loss is NaN or infinite; the message names the terms and images.
        """
        try:
            super().run_step()
        except FloatingPointError as error:
            raise FloatingPointError(self._watch.report(self.iter)) from error
        # Detectron2 checks on rank 0 only, where the images of other ranks are not known.
        if not comm.is_main_process() and self._watch.non_finite():
            raise FloatingPointError(self._watch.report(self.iter))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # Detectron2 0.5 forgets the optimizer.
        state["_trainer"] = self._trainer.state_dict()
        state["optimizer_class"] = _class_name(self._trainer.optimizer)
        state["seed"] = self.seed
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a run.

        Raises:
            CheckpointError: the checkpoint was written by another trainer or for other parameters.
        """
        if "_trainer" not in state or "seed" not in state:
            raise CheckpointError(
                "the checkpoint was not written by unseg's trainer, so the run cannot be resumed "
                f"exactly: {_INSTEAD}"
            )
        ours = _class_name(self._trainer.optimizer)
        theirs = state.get("optimizer_class", ours)
        if ours != theirs:  # SGD accepts AdamW's state and fails in its first step
            raise CheckpointError(
                f"the checkpoint's optimizer is {theirs}, the config's is {ours}: {_INSTEAD}"
            )
        try:
            super().load_state_dict(state)
            self._trainer.load_state_dict(state["_trainer"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's optimizer or hooks do not fit this config ({error}): {_INSTEAD}"
            ) from error
        self.data_loader.seed = state["seed"]
        self._restored = True


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    """Clipping may be switched on or off in a resumed run: Detectron2 makes it another class."""
    return type(optimizer).__name__.removesuffix("WithGradientClip")
