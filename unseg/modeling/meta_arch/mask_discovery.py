"""Discovery as a Detectron2 model: dense features, then masks, nothing trained."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from unseg.discovery import Discoverer, build_discoverer
from unseg.structures import PseudoMask, pad_pseudo_masks, stack_masks

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class MaskDiscovery(nn.Module):
    """A backbone and a discoverer (``cfg.DISCOVERY.NAME``) behind Detectron2's model interface.

    So pseudo-masks can be evaluated, drawn and written with the tools for trained models. Images
    are never padded: those of one size go through the backbone together. Where the backbone leaves
    out the incomplete patches at the right and bottom (it has a ``patch_size``), so do the masks.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        discoverer: Discoverer,
        in_feature: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        max_patches: int = 0,
    ):
        """
        Args:
            backbone: its output `in_feature` is (B, C, h, w).
            discoverer: finds the masks of one image in its features.
            in_feature: name of the backbone output.
            pixel_mean, pixel_std: normalisation of the input channels.
            max_patches: images of more cells of that output are made smaller; 0: none are.

        Raises:
            ValueError: the backbone has no such output.
        """
        super().__init__()
        if in_feature not in backbone.output_shape():
            raise ValueError(
                f"DISCOVERY.IN_FEATURE {in_feature!r} is not an output of the backbone: "
                f"{sorted(backbone.output_shape())}"
            )
        self.backbone = backbone
        self.discoverer = discoverer
        self.in_feature = in_feature
        self.max_patches = max_patches
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        # Why candidates were dropped, over all images seen.
        self.dropped: Counter[str] = Counter()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "backbone": build_backbone(cfg),
            "discoverer": build_discoverer(cfg),
            "in_feature": cfg.DISCOVERY.IN_FEATURE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_patches": cfg.DISCOVERY.MAX_PATCHES,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: dicts with ``image`` (3, H, W) and, optionally, the ``height`` and
                ``width`` of the image file.

        Returns:
            per image a dict with ``instances`` at the size of the file: pred_masks (N, H, W) bool,
            pred_boxes, scores, pred_classes (all 0) and, where the discoverer makes them,
            pred_embeddings (N, D).

        Raises:
            RuntimeError: the model is in training mode; nothing here can be trained.
        """
        if self.training:
            raise RuntimeError("MaskDiscovery has nothing to train: use it in eval mode")
        found = self.discover(batched_inputs)
        return [
            {"instances": to_instances(masks, image_size(x)).to(self.device)}
            for masks, x in zip(found, batched_inputs, strict=True)
        ]

    @torch.no_grad()
    def discover(self, batched_inputs: list[dict[str, Any]]) -> list[list[PseudoMask]]:
        """The pseudo-masks of each image; inputs as for :meth:`forward`."""
        found: list[list[PseudoMask]] = [[] for _ in batched_inputs]
        for index, features, extent in self._dense_features(batched_inputs):
            size = image_size(batched_inputs[index])
            covered = covered_size(size, extent)
            masks = self.discoverer(features, covered, dropped=self.dropped)
            found[index] = pad_pseudo_masks(masks, *size)
        return found

    def _dense_features(
        self, batched_inputs: list[dict[str, Any]]
    ) -> Iterator[tuple[int, Tensor, tuple[float, float]]]:
        """Index, features (C, h, w) and extent of every image that shows anything.

        The extent are the fractions of the image's height and width that the grid covers.
        """
        by_size = defaultdict(list)
        for index, x in enumerate(batched_inputs):
            image = x["image"]
            if bool((image == image[:, :1, :1]).all()):
                # Backbones know where a patch is: even such an image would have segments.
                logger.info("%s: no instances: one colour", x.get("file_name", "an image"))
                self.dropped["images: one colour"] += 1
                continue
            by_size[tuple(image.shape)].append(index)
        for indices in by_size.values():
            batch = torch.stack([batched_inputs[i]["image"] for i in indices])
            batch = self._limited(batch.to(self.device, dtype=torch.float32))
            with torch.inference_mode():
                batch = (batch - self.pixel_mean) / self.pixel_std
                features = self.backbone(batch)[self.in_feature]
            extent = self._extent(features.shape[-2:], batch.shape[-2:])
            yield from ((index, f, extent) for index, f in zip(indices, features, strict=True))

    def _limited(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), made smaller if they have more patches than `max_patches`."""
        stride = self.backbone.output_shape()[self.in_feature].stride
        height, width = images.shape[-2:]
        patches = (height // stride) * (width // stride)
        if not 0 < self.max_patches < patches:
            return images
        # By area, incomplete patches counted as well. Only a strip of one patch loses its aspect.
        factor = stride * math.sqrt(self.max_patches / (height * width))
        size = tuple(
            min(max(stride, math.floor(side * factor)), stride * self.max_patches)
            for side in (height, width)
        )
        log_first_n(
            logging.WARNING,
            f"An image of {height} x {width} has {patches} patches, more than "
            f"DISCOVERY.MAX_PATCHES {self.max_patches}: it is made smaller, {size[0]} x {size[1]}, "
            "and so are all such images.",
            name=__name__,
        )
        return F.interpolate(
            images, size=size, mode="bilinear", align_corners=False, antialias=True
        )

    def _extent(self, grid: Sequence[int], size: Sequence[int]) -> tuple[float, float]:
        patch = getattr(self.backbone, "patch_size", None)
        if patch is None:
            return 1.0, 1.0
        return grid[0] * patch / size[0], grid[1] * patch / size[1]


def covered_size(size: tuple[int, int], extent: tuple[float, float]) -> tuple[int, int]:
    """Height and width in pixels of the part of an image that has an extent, at least 1."""
    return tuple(max(1, round(side * part)) for side, part in zip(size, extent, strict=True))


def image_size(x: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of the image file of an input dict."""
    return x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])


def to_instances(masks: list[PseudoMask], size: tuple[int, int]) -> Instances:
    """Detectron2 instances of pseudo-masks, on the CPU; fields as in MaskDiscovery.forward."""
    instances = Instances(size)
    instances.pred_masks = stack_masks(masks, *size)
    boxes = torch.tensor([m.box for m in masks], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.tensor([m.score for m in masks], dtype=torch.float32)
    instances.pred_classes = torch.zeros(len(masks), dtype=torch.int64)
    if masks and all(m.embedding is not None for m in masks):
        instances.pred_embeddings = torch.stack([torch.from_numpy(m.embedding) for m in masks])
    return instances
