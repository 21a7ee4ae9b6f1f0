"""Discovery as a Detectron2 model: dense features, then masks, nothing trained."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from unseg.discovery import Discoverer, build_discoverer
from unseg.structures import PseudoMask, stack_masks


@META_ARCH_REGISTRY.register()
class MaskDiscovery(nn.Module):
    """A backbone and a discoverer (``cfg.DISCOVERY.NAME``) behind Detectron2's model interface.

    So pseudo-masks can be evaluated, drawn and written with the tools for trained models. Images
    are never padded: those of one size go through the backbone together.
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
    ):
        """
        Args:
            backbone: its output `in_feature` is (B, C, h, w).
            discoverer: finds the masks of one image in its features.
            in_feature: name of the backbone output.
            pixel_mean, pixel_std: normalisation of the input channels.

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
        by_size = defaultdict(list)
        for index, x in enumerate(batched_inputs):
            by_size[tuple(x["image"].shape)].append(index)
        found: list[list[PseudoMask]] = [[] for _ in batched_inputs]
        for indices in by_size.values():
            features = self._features([batched_inputs[i]["image"] for i in indices])
            for index, feature in zip(indices, features, strict=True):
                size = image_size(batched_inputs[index])
                found[index] = self.discoverer(feature, size, dropped=self.dropped)
        return found

    def _features(self, images: list[Tensor]) -> Tensor:
        batch = torch.stack(images).to(self.device, dtype=torch.float32)
        return self.backbone((batch - self.pixel_mean) / self.pixel_std)[self.in_feature]


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
