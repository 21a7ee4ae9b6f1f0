"""DeepMask: a mask and a score for every window of an image pyramid.

Sources: Pinheiro, Collobert and Dollar, "Learning to segment object candidates" (NeurIPS 2015), and
the released variant of Pinheiro et al., "Learning to refine object segments" (ECCV 2016). Where
they leave something open, the choices are those of specs/proposals.md.

Legend: B images, P patches of a step, H W pixels, C channels, h w cells of the trunk's map, h' w'
windows, N chosen windows, m pixels per side of a mask, g of the mask that the loss compares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from unseg.layers import resize_image, scaled_size
from unseg.modeling.proposals import (
    ProposalSettings,
    as_outputs,
    grid_windows,
    make_proposals,
    to_output,
    top_windows,
)
from unseg.modeling.proposals.deepmask_geometry import GREY, PatchGeometry
from unseg.modeling.proposals.deepmask_heads import DeepMaskHead, build_deepmask_head
from unseg.modeling.proposals.deepmask_losses import DeepMaskLosses, mask_loss, score_loss
from unseg.modeling.proposals.mirror_padding import set_padding
from unseg.structures import WindowMasks


class Scorer(nn.Module):
    """A second trunk and head whose scores are taken instead of the first one's (DeepMask20*)."""

    def __init__(self, backbone: Backbone, head: DeepMaskHead):
        super().__init__()
        self.backbone = backbone
        self.head = head


@dataclass
class EncodedImages:
    """What windows' masks are made of, for a batch of patches or one scale of an image.

    Attributes:
        maps: of the trunk by name, (B, C, h, w), in patches with the context.
        encoded: what the head made of them, in patches without the context.
        scores: (B, h', w') logits.
        margin: cells of context before the first window, on the map that the head reads.
    """

    maps: dict[str, Tensor]
    encoded: Any
    scores: Tensor
    margin: int = 0


@META_ARCH_REGISTRY.register()
class DeepMask(nn.Module):
    """Trained on patches that hold one object in the middle, or none; applied to whole images.

    Training input per image, besides a dataset dict's fields: ``patches`` float (P, 3, s, s), raw
    pixels with 127.5 outside the image, s = INPUT_SIZE + CONTEXT; ``patch_masks`` (P, g, g), +1 and
    -1, of positives (never read for negatives); ``patch_labels`` (P,), +1 or -1.

    With ``train_mode="alternate"`` only one branch learns in a step; the other one's gradients are
    zeros. That it does not move by weight decay or momentum either is up to the optimizer: see
    :meth:`idle_parameters` and :func:`unseg.engine.hooks.let_idle_parameters_rest`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: DeepMaskHead,
        geometry: PatchGeometry,
        in_feature: str,
        losses: DeepMaskLosses,
        scales: Sequence[float],
        inference: ProposalSettings,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        scorer: Scorer | None = None,
    ):
        """
        Args:
            backbone: the trunk; 3 input channels.
            head: for windows of `geometry` on the map `in_feature`.
            geometry: sizes of patches and masks.
            in_feature: the trunk's map that the head reads.
            losses: how training weighs the losses.
            scales: of the image pyramid, as powers of 2.
            inference: how proposals are made of windows.
            pixel_mean, pixel_std: normalisation of the input channels.
            scorer: takes over the scores; such a model cannot be trained.

        Raises:
            ValueError: they do not fit together; the message names the config's key.
        """
        super().__init__()
        shapes = backbone.output_shape()
        _check_feature(shapes, in_feature)
        self.backbone = backbone
        self.head = head
        self.scorer = scorer
        self.geometry = geometry
        self.in_feature = in_feature
        self.losses = losses
        self.scales = tuple(float(scale) for scale in scales)
        self.inference = inference
        self.strides = {name: shape.stride for name, shape in shapes.items()}
        self.stride = self.strides[in_feature]
        # Images are padded to a multiple of it.
        self.divisibility = math.lcm(self.stride, max(backbone.size_divisibility, 1))
        self._check()
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        if losses.train_mode == "alternate":
            # Training steps so far: the coin of a resumed run goes on where it was.
            self.register_buffer("_iter", torch.zeros([1], dtype=torch.int64))
        self._idle: list[nn.Module] = []

    def _check(self) -> None:
        cells = self.geometry.cells(self.stride)
        if self.head.cells != cells:
            raise ValueError(
                f"MODEL.DEEPMASK.INPUT_SIZE is {cells} cells of MODEL.DEEPMASK.IN_FEATURE, the "
                f"head is for {self.head.cells}"
            )
        if self.head.out_size != self.geometry.out_size:
            raise ValueError(
                f"MODEL.DEEPMASK.OUT_SIZE is {self.geometry.out_size}, the head's "
                f"{self.head.out_size}"
            )
        if self.geometry.patch_size % self.divisibility:
            raise ValueError(
                "MODEL.DEEPMASK.INPUT_SIZE + CONTEXT must be a multiple of "
                f"{self.divisibility} for this backbone: {self.geometry.patch_size}"
            )
        if not self.scales or not all(math.isfinite(scale) for scale in self.scales):
            raise ValueError(f"MODEL.DEEPMASK.TEST.SCALES must be numbers: {self.scales}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DEEPMASK
        geometry = PatchGeometry.from_config(cfg)
        backbone, head = _build_net(cfg, geometry)
        return {
            "backbone": backbone,
            "head": head,
            "scorer": Scorer(*_build_net(cfg, geometry)) if node.TEST.SCORER else None,
            "geometry": geometry,
            "in_feature": node.IN_FEATURE,
            "losses": DeepMaskLosses.from_config(cfg),
            "scales": node.TEST.SCALES,
            "inference": ProposalSettings.from_node(node.TEST),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def reset_schedule(self) -> None:
        """Begin the sequence of coins anew: for weights that another run has trained."""
        if self.losses.train_mode == "alternate":
            self._iter.zero_()

    def idle_parameters(self) -> list[nn.Parameter]:
        """The weights that the last training step has nothing to say about."""
        return [p for module in self._idle for p in module.parameters()]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: in training the dicts of the class's docstring. Else dicts with
                ``image`` (3, H, W), raw pixels, and optionally ``height`` and ``width`` of the
                output image; ``patches`` are segmented as well if they are there.

        Returns:
            in training ``loss_mask`` and ``loss_score``, else what
            :func:`unseg.modeling.proposals.as_outputs` gives for each image; and for patches
            ``patch_logits`` float32 (P, g, g) and ``patch_scores`` float32 (P,), logits.
        """
        if self.training:
            return self._train_step(batched_inputs)
        with torch.no_grad():
            return [self._infer(x) for x in batched_inputs]

    # What subclasses may replace.

    def map_names(self) -> tuple[str, ...]:
        """The trunk's maps that :meth:`mask_logits` reads besides what the head encoded."""
        return (self.in_feature,)

    def mask_logits(self, images: EncodedImages, locations: Tensor) -> Tensor:
        """(N, m, m) of the windows at `locations`, int64 (N, 3) of image, row and column."""
        return self.head.masks(images.encoded, locations)

    def upsample(self, logits: Tensor) -> Tensor:
        """Masks (N, m, m) at the resolution of the loss, float32 (N, g, g)."""
        size = (self.geometry.gt_size, self.geometry.gt_size)
        logits = logits.float()
        if logits.shape[-2:] == size or len(logits) == 0:
            return logits
        corners = self.geometry.align_corners
        return F.interpolate(logits[:, None], size, mode="bilinear", align_corners=corners)[:, 0]

    # The nets.

    def encode(
        self, images: Tensor, in_patches: bool = False, with_scores: bool = True
    ) -> EncodedImages:
        """Run trunk and head on raw images (B, 3, H, W).

        Args:
            images: float32, raw pixels.
            in_patches: cut off the context.
            with_scores: else the scores are (0, h', w'): computed from nothing, but connected to
                the weights, as distributed training needs it.
        """
        images = (images - self.pixel_mean) / self.pixel_std
        margin = self.geometry.context // 2 // self.stride if in_patches else 0
        maps = self._trunk(self.backbone, images, self.map_names())
        features = without_margin(maps[self.in_feature], margin)
        encoded = self.head.encode(features)
        if self.scorer is not None:
            seen = self._trunk(self.scorer.backbone, images, (self.in_feature,))
            head = self.scorer.head
            scores = head.scores(head.encode(without_margin(seen[self.in_feature], margin)))
        elif with_scores:
            scores = self.head.scores(encoded)
        else:
            scores = self.head.scores(self.head.encode(features[:0]))
        return EncodedImages(maps, encoded, scores, margin)

    def _trunk(self, backbone: Backbone, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        maps = backbone(images)
        return {name: maps[name] for name in names}

    # Training.

    def _train_step(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.scorer is not None:
            raise ValueError(
                "MODEL.DEEPMASK.TEST.SCORER is for inference: train both models by themselves and "
                "join them by unseg.tools.merge_scorer"
            )
        labels, patches, targets = self._patches(batched_inputs)
        factor = self.losses.factor(len(labels))
        branch = self._next_branch()
        positive = (labels > 0).nonzero()[:, 0]
        if branch == "mask":
            # Negatives have no say; without positives one patch connects the losses to the trunk.
            kept = positive if len(positive) else torch.arange(1)
            patches = patches[kept.to(self.device)]
            chosen = torch.arange(len(positive))
        else:
            chosen = positive if branch == "both" else positive[:0]
        images = self.encode(patches, in_patches=True, with_scores=branch != "mask")
        locations = F.pad(chosen[:, None], (0, 2)).to(self.device)
        logits = self.mask_logits(images, locations)
        with torch.autocast(self.device.type, enabled=False):
            masks = targets[positive.to(self.device)][: len(chosen)]
            loss_mask = mask_loss(self.upsample(logits), masks)
            scores = images.scores.float().flatten()
            loss_score = score_loss(scores, labels[: len(scores)].to(self.device))
            return {
                "loss_mask": loss_mask * factor,
                "loss_score": loss_score * (factor * self.losses.score_weight),
            }

    def _next_branch(self) -> str:
        """Which losses this step is about: "both", "mask" or "score"."""
        if self.losses.train_mode == "joint":
            return "both"
        branch = self.losses.coin(int(self._iter))
        self._iter += 1
        self._idle = self.head.score_branch() if branch == "mask" else self.head.mask_branch()
        return branch

    def _patches(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (P,), on the CPU, patches (P, 3, s, s) and targets (P, g, g) of a batch."""
        fields = ("patch_labels", "patches", "patch_masks")
        for x in batched_inputs:
            missing = [name for name in fields if name not in x]
            if missing:
                raise ValueError(
                    f"{x.get('file_name', 'an image')}: training needs {', '.join(missing)} "
                    "(of DeepMaskPatchMapper)"
                )
        labels, patches, targets = (torch.cat([x[f] for x in batched_inputs]) for f in fields)
        side, mask_side = self.geometry.patch_size, self.geometry.gt_size
        wanted = {"patches": (3, side, side), "patch_masks": (mask_side, mask_side)}
        for name, value in (("patches", patches), ("patch_masks", targets)):
            if tuple(value.shape) != (len(labels), *wanted[name]):
                raise ValueError(
                    f"{name} must be {(len(labels), *wanted[name])} by MODEL.DEEPMASK's INPUT_SIZE,"
                    f" CONTEXT and GT_SIZE, not {tuple(value.shape)}"
                )
        if len(labels) == 0:
            raise ValueError("a batch must have patches")
        return labels.cpu(), patches.to(self.device, torch.float32), targets.to(self.device)

    # Inference.

    def _infer(self, x: dict[str, Any]) -> dict[str, Any]:
        image = x["image"].to(self.device, torch.float32)
        output_size = (x.get("height", image.shape[1]), x.get("width", image.shape[2]))
        outputs = as_outputs(self._propose(image, output_size))
        if "patches" in x:
            outputs |= self._segment_patches(x["patches"].to(self.device, torch.float32))
        return outputs

    def _propose(self, image: Tensor, output_size: tuple[int, int]) -> Any:
        levels, boxes = [], []
        for scale in self.scales:
            size = scaled_size(image.shape[-2:], 2.0**scale)
            levels.append(self._encode_scale(resize_image(image, size)))
            windows = grid_windows(
                levels[-1].scores.shape[-2:], self.stride, 0, self.geometry.input_size, self.device
            )
            boxes.append(to_output(windows, size, output_size))
        best = top_windows([level.scores for level in levels], boxes, self.inference.topk)
        masks = WindowMasks(
            self._probabilities(levels, best.scales, best.places),
            best.boxes,
            output_size,
            self.inference.mask_threshold,
            self.geometry.align_corners,
        )
        return make_proposals(masks, best.logits, self.inference)

    def _encode_scale(self, image: Tensor) -> EncodedImages:
        """One resized image (3, H, W), with the windows that its border cuts."""
        height, width = image.shape[-2:]
        padding = self.geometry.padding(height, width, self.divisibility)
        encoded = self.encode(F.pad(image, padding, value=GREY)[None])
        rows, columns = self.geometry.grid(height, width, self.stride)
        encoded.scores = encoded.scores[:, :rows, :columns].float()
        return encoded

    def _probabilities(
        self, levels: Sequence[EncodedImages], scales: Tensor, places: Tensor
    ) -> Tensor:
        """float32 (N, m, m) of windows by scale and place in its flat grid."""
        masks, order = [], []
        for index, level in enumerate(levels):
            chosen = (scales == index).nonzero()[:, 0]
            columns = level.scores.shape[-1]
            place = places[chosen]
            locations = torch.stack(
                [torch.zeros_like(place), place // columns, place % columns], dim=1
            )
            masks.append(self.mask_logits(level, locations).float().sigmoid())
            order.append(chosen)
        return torch.cat(masks)[torch.cat(order).argsort()]

    def _segment_patches(self, patches: Tensor) -> dict[str, Tensor]:
        images = self.encode(patches, in_patches=True)
        locations = F.pad(torch.arange(len(patches), device=self.device)[:, None], (0, 2))
        return {
            "patch_logits": self.upsample(self.mask_logits(images, locations)),
            "patch_scores": images.scores.float().flatten(),
        }


def _check_feature(shapes: dict[str, Any], in_feature: str) -> None:
    if in_feature not in shapes:
        raise ValueError(
            f"MODEL.DEEPMASK.IN_FEATURE must be one of the backbone's maps, {', '.join(shapes)}: "
            f"{in_feature!r}"
        )


def _build_net(cfg: CfgNode, geometry: PatchGeometry) -> tuple[Backbone, DeepMaskHead]:
    backbone = build_backbone(cfg)
    set_padding(backbone, cfg.MODEL.DEEPMASK.PAD_MODE)
    shapes = backbone.output_shape()
    _check_feature(shapes, cfg.MODEL.DEEPMASK.IN_FEATURE)
    shape = shapes[cfg.MODEL.DEEPMASK.IN_FEATURE]
    cells = geometry.cells(shape.stride)
    return backbone, build_deepmask_head(cfg, in_channels=shape.channels, cells=cells)


def without_margin(features: Tensor, margin: int) -> Tensor:
    """Cut so many cells off each side of a map.

    Done before the head's large convolution, which would else compute windows that nobody reads.
    """
    return features[:, :, margin:-margin, margin:-margin] if margin else features
