"""The exemplar embedding contrastive (EEC) head of Exemplar-FreeSOLO, for any model.

The paper (Ishtiak et al., CVPR 2023) says: query features of unit length, multiplied by the
predicted mask, are drawn to a similar exemplar and pushed away from dissimilar ones. How the pool
is encoded and when is our choice.

Legend: B images, N objects, K exemplars, C channels (the length of an embedding), H W input
pixels, h w cells of the feature map.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unseg.modeling.losses import (
    check_thresholds,
    choose_exemplars,
    compare_with_exemplars,
    exemplar_contrastive_loss,
)
from unseg.structures import ExemplarPool


class ExemplarFeatureError(ValueError):
    """The pool or the backbone lacks what the head needs; the message names it."""


class MaskedEmbedding(nn.Module):
    """What features say inside soft masks: a unit vector for each."""

    def forward(
        self, features: Tensor, masks: Tensor, counts: Sequence[int] | None = None
    ) -> Tensor:
        """
        The sum over a mask is linear in it: shrinking the mask to the cells says the same as
        blowing up the features to its pixels, the paper's form, at 1/64 of the cost or less.

        Args:
            features: (B, C, h, w), or (N, C, h, w), one map per mask.
            masks: (N, H', W') in [0, 1], at any resolution, covering what the features cover.
            counts: masks of each of the B images; None for one map per mask.

        Returns:
            (N, C) float32 of unit length; zeros for empty masks.
        """
        cells = features.float()
        lengths = cells.norm(dim=1, keepdim=True)
        # Cells of zeros have no direction; F.normalize would give them gradients of 1e12.
        cells = cells / torch.where(lengths > 0, lengths, 1.0)
        weights = masks.float()
        if weights.shape[-2:] != cells.shape[-2:]:
            # Each an image of its own: of an image without channels there is no gradient.
            weights = F.interpolate(weights[:, None], size=cells.shape[-2:], mode="area")[:, 0]
        if counts is None:
            sums = torch.einsum("nchw,nhw->nc", cells, weights)
        else:
            parts = zip(weights.flatten(1).split(list(counts)), cells.flatten(2), strict=True)
            sums = torch.cat([part @ cell.t() for part, cell in parts])
        return F.normalize(sums, dim=1)


class ExemplarContrast(nn.Module):
    """The loss between a batch's objects and the embeddings of an exemplar pool.

    :func:`with_exemplars` gives it a pool. It adds nothing to a model's checkpoints.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str = "res5",
        weight: float = 1.3,
        alpha: float = 0.7,
        beta: float = 0.3,
        temperature: float = 0.1,
        reduction: str = "mean",
    ):
        """
        Args:
            in_feature: name of the backbone's output that objects are embedded in.
            weight: of the loss (the paper's lambda).
            alpha, beta, temperature, reduction: see
                :func:`unseg.modeling.losses.exemplar_contrastive_loss`.

        Raises:
            ValueError: the settings make no loss.
        """
        super().__init__()
        check_thresholds(alpha, beta, temperature, reduction)
        self.in_feature = in_feature
        self.weight = weight
        self.alpha, self.beta = alpha, beta
        self.temperature = temperature
        self.reduction = reduction
        self.embed = MaskedEmbedding()
        self.encoder: PoolEncoder | None = None
        self.register_buffer("pool_embeddings", torch.zeros(0, 0), persistent=False)
        # Since they were last read: objects, those with a positive, those that count, negatives.
        self.register_buffer("tally", torch.zeros(4), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        exemplar = cfg.MODEL.EXEMPLAR
        keys = ("IN_FEATURE", "WEIGHT", "ALPHA", "BETA", "TEMPERATURE", "REDUCTION")
        return {key.lower(): exemplar[key] for key in keys}

    def forward(
        self, features: Tensor, masks: Tensor, counts: Sequence[int] | None = None
    ) -> Tensor:
        """The weighted loss of objects, a scalar.

        Args:
            features, masks, counts: see :class:`MaskedEmbedding`; gradients flow through both
                features and masks.

        Raises:
            ExemplarFeatureError: there is no pool, or its embeddings have another length.
        """
        if len(self.pool_embeddings) == 0:
            raise ExemplarFeatureError(
                "training needs an exemplar pool: MODEL.EXEMPLAR.POOL names a file of "
                "unseg.tools.build_exemplars (without unseg's trainer: "
                "unseg.modeling.with_exemplars)"
            )
        if features.shape[1] != self.pool_embeddings.shape[1]:
            raise ExemplarFeatureError(
                f"MODEL.EXEMPLAR.IN_FEATURE {self.in_feature} has {features.shape[1]} channels, "
                f"the exemplars' embeddings {self.pool_embeddings.shape[1]}: the pool was made "
                "with another backbone. With UPDATE_PERIOD above 0 it is encoded anew"
            )
        embeddings = self.embed(features, masks, counts)
        self._count(embeddings.detach())
        return self.weight * exemplar_contrastive_loss(
            embeddings,
            self.pool_embeddings,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            reduction=self.reduction,
        )

    def _count(self, embeddings: Tensor) -> None:
        similarities = compare_with_exemplars(embeddings, self.pool_embeddings)
        has_positive, _, negatives = choose_exemplars(similarities, self.alpha, self.beta)
        counting = has_positive & negatives.any(dim=1)
        seen = embeddings.any(dim=1)
        self.tally += torch.stack([x.sum() for x in (seen, has_positive, counting, negatives)])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics, and keep them, inside the block."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def find_feature(features: dict[str, Tensor], name: str) -> Tensor:
    """The backbone's output of a name.

    Raises:
        ExemplarFeatureError: it has no such output; the message lists those it has.
    """
    if name not in features:
        raise ExemplarFeatureError(
            f"MODEL.EXEMPLAR.IN_FEATURE {name!r} is none of the backbone's outputs "
            f"({', '.join(features)}): MODEL.BACKBONE.NAME "
            "build_resnet_fpn_with_bottom_up_backbone has a ResNet's own besides the pyramid's"
        )
    return features[name]


@torch.no_grad()
def encode_exemplars(
    model: nn.Module,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    in_feature: str,
    batch_size: int,
) -> Tensor:
    """Embeddings of object images by a model's backbone as it is now.

    Args:
        model: has ``backbone``, ``pixel_mean`` and ``pixel_std``, as Detectron2's models do, and
            ``input_format`` "RGB" or "BGR". Its modes and statistics stay as they are.
        images: K arrays (H, W, 3) uint8 RGB.
        masks: K arrays (H, W) bool.
        in_feature: name of the backbone's output.
        batch_size: images at a time. Processes of a distributed training share the batches, and
            all get the same embeddings.

    Returns:
        (K, C) float32 of unit length, on the model's device.

    Raises:
        ExemplarFeatureError: the backbone has no such output.
    """
    starts = range(0, len(images), batch_size)
    own = range(comm.get_rank(), len(starts), comm.get_world_size())
    parts = {}
    with _evaluating(model.backbone), torch.autocast(model.device.type, enabled=False):
        for number in own:
            part = slice(starts[number], starts[number] + batch_size)
            parts[number] = encode_batch(model, images[part], masks[part], in_feature).cpu()
    gathered: dict[int, Tensor] = {}
    for share in comm.all_gather(parts):
        gathered |= share
    return torch.cat([gathered[number] for number in sorted(gathered)]).to(model.device)


@torch.no_grad()
def encode_batch(
    model: nn.Module, images: Sequence[np.ndarray], masks: Sequence[np.ndarray], in_feature: str
) -> Tensor:
    """The embeddings (K, C) of one batch, by this process alone, in the backbone's present mode.

    See :func:`encode_exemplars`. Images go through the backbone beside others of the same padded
    size only: a wider border of zeros would change their features, and with them what an exemplar
    is.
    """
    divisibility = max(32, model.backbone.size_divisibility)
    of_size = defaultdict(list)
    for number, image in enumerate(images):
        of_size[tuple(-(-side // divisibility) for side in image.shape[:2])].append(number)
    embeddings = {}
    flip = -1 if model.input_format == "BGR" else 1
    for numbers in of_size.values():
        tensors = [
            torch.from_numpy(np.ascontiguousarray(images[number][:, :, ::flip]))
            .to(model.device)
            .permute(2, 0, 1)
            for number in numbers
        ]
        normalized = [(x.float() - model.pixel_mean) / model.pixel_std for x in tensors]
        weights = [torch.from_numpy(masks[number]).to(model.device).float() for number in numbers]
        features = model.backbone(ImageList.from_tensors(normalized, divisibility).tensor)
        rows = MaskedEmbedding()(
            find_feature(features, in_feature),
            ImageList.from_tensors(weights, divisibility).tensor,
            [1] * len(numbers),
        )
        embeddings |= dict(zip(numbers, rows, strict=True))
    return torch.stack([embeddings[number] for number in range(len(images))])


class PoolEncoder:
    """Keeps a head's embeddings of a pool up to date, before training steps of a model.

    Its state is not the model's (weights go in and out of other models unchanged); `unseg`'s
    trainer keeps it in checkpoints.
    """

    def __init__(self, head: ExemplarContrast, pool: ExemplarPool, period: int, batch_size: int):
        self.head = head
        self.pool = pool
        self.period = period
        self.batch_size = batch_size
        self.step = 0
        self.handle: RemovableHandle | None = None  # of the hook

    def __call__(self, model: nn.Module, args: tuple) -> None:
        """A forward pre-hook."""
        if not model.training:
            return
        if self.period and self.step % self.period == 0:
            self.head.pool_embeddings = encode_exemplars(
                model,
                [x.image for x in self.pool.exemplars],
                [x.mask for x in self.pool.exemplars],
                in_feature=self.head.in_feature,
                batch_size=self.batch_size,
            )
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "pool": _fingerprint(self.pool),
            "step": self.step,
            "embeddings": self.head.pool_embeddings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a run.

        Raises:
            ValueError: it had another pool.
        """
        embeddings = state["embeddings"].to(self.head.pool_embeddings.device)
        # Those of the file, where they are used, may be others for the same images.
        same = self.period or torch.equal(embeddings, self.head.pool_embeddings)
        if state["pool"] != _fingerprint(self.pool) or not same:
            raise ValueError("the run was begun with another exemplar pool")
        self.step = state["step"]
        self.head.pool_embeddings = embeddings


def _fingerprint(pool: ExemplarPool) -> str:
    digest = hashlib.sha256()
    for exemplar in pool.exemplars:
        for array in (exemplar.image, exemplar.mask):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def find_exemplar_head(model: nn.Module) -> ExemplarContrast | None:
    """The head inside a model, if it has one that is used."""
    heads = [m for m in model.modules() if isinstance(m, ExemplarContrast) and m.weight]
    return heads[0] if heads else None


def with_exemplars(
    model: nn.Module, pool: ExemplarPool, *, update_period: int = 500, batch_size: int = 8
) -> nn.Module:
    """Give the head inside a model its pool, to be encoded anew every so many training steps.

    A pool that it has is replaced.

    Args:
        model: has an :class:`ExemplarContrast` somewhere.
        pool: the exemplars.
        update_period: training steps; 0 for the embeddings that the pool has.
        batch_size: exemplars encoded at a time.

    Returns:
        the model.

    Raises:
        ExemplarFeatureError: the model has no such head, or the pool is empty.
        ValueError: the period is negative, or it is 0 and the pool has no embeddings.
    """
    head = find_exemplar_head(model)
    if head is None:
        raise ExemplarFeatureError(
            f"{type(model).__name__} has no ExemplarContrast with a weight: there is nothing that "
            "exemplars would be used for"
        )
    if len(pool) == 0:
        raise ExemplarFeatureError("the exemplar pool is empty")
    if update_period < 0:
        raise ValueError(f"MODEL.EXEMPLAR.UPDATE_PERIOD must be 0 or more, got {update_period}")
    if not update_period:
        head.pool_embeddings = torch.from_numpy(pool.embeddings).to(head.pool_embeddings.device)
    if head.encoder is not None:
        head.encoder.handle.remove()
    head.encoder = PoolEncoder(head, pool, update_period, batch_size)
    head.encoder.handle = model.register_forward_pre_hook(head.encoder)
    return model
