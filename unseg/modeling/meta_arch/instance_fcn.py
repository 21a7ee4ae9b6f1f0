"""InstanceFCN (Dai et al., "Instance-sensitive fully convolutional networks", 2016): mask
proposals assembled from instance-sensitive score maps.

Legend: B images, H W pixels, C channels, P patches, w side of a patch, m cells per side of a
window, h w cells of a map.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from torch import Tensor, nn

from unseg.layers import resize_image, scaled_size
from unseg.modeling.proposals.deepmask_geometry import PatchGeometry
from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead, LevelMaps
from unseg.modeling.proposals.instance_fcn_losses import TrainingWindows
from unseg.modeling.proposals.outputs import ProposalSettings, as_outputs, make_proposals
from unseg.modeling.proposals.pyramid import to_output
from unseg.structures import WindowMasks

_TRAIN_ON = ("image", "crop")


def center_cell(geometry: PatchGeometry, head: InstanceFCNHead) -> int:
    """Row and column of the cell in the middle of DeepMask's patches, on the map of a head.

    Raises:
        ValueError: there is no such cell, or the patches are not of the head's windows; the
            message names the config's keys.
    """
    if len(head.levels) != 1:
        raise ValueError(
            "MODEL.INSTANCE_FCN.TRAIN_ON crop needs one map in MODEL.INSTANCE_FCN.IN_FEATURES: "
            f"{head.in_features}"
        )
    level, m = head.levels[0], head.m
    for name, value, needed in (
        ("INPUT_SIZE", geometry.input_size, m * level.stride),
        ("GT_SIZE", geometry.gt_size, m),
        ("OBJECT_SIZE", geometry.object_size, round(level.object_size)),
    ):
        if value != needed:
            raise ValueError(
                f"MODEL.DEEPMASK.{name} must be {needed} with MODEL.INSTANCE_FCN.TRAIN_ON crop,"
                f" M {m} and stride {level.stride}: {value}"
            )
    cell = (geometry.patch_size / 2 - level.offset) / level.stride
    if cell != int(cell):
        raise ValueError(
            f"MODEL.DEEPMASK.CONTEXT {geometry.context}: no cell is in the middle of a patch of "
            f"{geometry.patch_size} pixels (stride {level.stride}, first cell at {level.offset})"
        )
    return int(cell)


@META_ARCH_REGISTRY.register()
class InstanceFCN(nn.Module):
    """Per cell of a map one window: the objectness of what is centred in it, and its mask.

    At test time an image pyramid is built inside the model, from the image as it comes.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: InstanceFCNHead,
        proposals: ProposalSettings,
        short_sides: Sequence[int],
        max_size: int = 2000,
        pre_nms_topk: int,
        crop: PatchGeometry | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
    ):
        """
        Args:
            backbone: its outputs hold what the head reads.
            head: the two branches.
            proposals: how proposals are made of windows.
            short_sides: of the images in the test pyramid; empty: the image as it comes.
            max_size: longest side of the images in the pyramid.
            pre_nms_topk: windows kept per scale and level.
            crop: train on such patches, with a target of m x m cells; None: on images.
            pixel_mean, pixel_std: normalisation of the input channels.
            input_format: "RGB" or "BGR", order of the input channels.

        Raises:
            ValueError: an argument has no such value, or the patches do not fit the head's windows;
                the message names the config's keys.
        """
        super().__init__()
        if any(side < 1 for side in short_sides):
            raise ValueError(
                f"MODEL.INSTANCE_FCN.TEST.SHORT_SIDES must be positive: {tuple(short_sides)}"
            )
        if max_size < 1:
            raise ValueError(f"MODEL.INSTANCE_FCN.TEST.MAX_SIZE must be positive: {max_size}")
        if pre_nms_topk < 1:
            raise ValueError(
                f"MODEL.INSTANCE_FCN.TEST.PRE_NMS_TOPK must be positive: {pre_nms_topk}"
            )
        self.backbone = backbone
        self.head = head
        self.proposals = proposals
        self.short_sides = tuple(short_sides)
        self.max_size = max_size
        self.pre_nms_topk = pre_nms_topk
        self.crop = crop
        self.center_cell = None if crop is None else center_cell(crop, head)
        self.input_format = input_format
        # So that each side of a map has a cell for every stride of the image that is begun.
        self.divisibility = math.lcm(
            max(1, backbone.size_divisibility),
            *(shape.stride for shape in backbone.output_shape().values()),
        )
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        node = cfg.MODEL.INSTANCE_FCN
        if node.TRAIN_ON not in _TRAIN_ON:
            raise ValueError(
                f"MODEL.INSTANCE_FCN.TRAIN_ON must be one of {_TRAIN_ON}: {node.TRAIN_ON!r}"
            )
        offsets = backbone.cell_offsets() if hasattr(backbone, "cell_offsets") else None
        return {
            "backbone": backbone,
            "head": InstanceFCNHead(cfg, backbone.output_shape(), offsets),
            "proposals": ProposalSettings.from_node(node.TEST),
            "short_sides": node.TEST.SHORT_SIDES,
            "max_size": node.TEST.MAX_SIZE,
            "pre_nms_topk": node.TEST.PRE_NMS_TOPK,
            "crop": PatchGeometry.from_config(cfg) if node.TRAIN_ON == "crop" else None,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: dicts with ``image`` (3, H, W) and, optionally, the ``height`` and
                ``width`` of the image file. In training ``instances`` with gt_boxes and gt_masks
                and, optionally, ``crowd_masks`` (BitMasks), in which no window is looked at; or,
                to train on patches, ``patches`` (P, 3, w, w), ``patch_masks`` (P, m, m) and
                ``patch_labels`` (P,), both positive or not.

        Returns:
            in training the losses of :func:`unseg.modeling.proposals.instance_fcn_losses.
            window_losses`, else per image what :func:`unseg.modeling.proposals.outputs.as_outputs`
            makes, at the size of the file.

        Raises:
            KeyError: an input lacks what is trained on.
            ValueError: objects have no masks, or patches are of another size.
        """
        if not self.training:
            return [self._infer(x) for x in batched_inputs]
        if self.crop is None:
            windows = self._image_windows(batched_inputs)
        else:
            windows = self._patch_windows(batched_inputs)
        with torch.autocast(self.device.type, enabled=False):
            return self.head.losses(windows)

    def _maps(self, images: Tensor) -> list[LevelMaps]:
        """The head's maps of raw images (B, 3, H, W), which are padded by their mean."""
        height, width = images.shape[-2:]
        padding = (0, -width % self.divisibility, 0, -height % self.divisibility)
        images = (images.to(torch.float32) - self.pixel_mean) / self.pixel_std
        features = self.backbone(F.pad(images, padding))
        maps = self.head(features)
        unread = [x for name, x in features.items() if name not in self.head.in_features]
        if self.training and unread:  # distributed training wants a gradient, if 0, of each weight
            nothing = sum(x.mean() for x in unread) * 0
            maps[0] = LevelMaps(maps[0].masks, maps[0].scores + nothing)
        return maps

    def _image_windows(self, batched_inputs: list[dict[str, Any]]) -> TrainingWindows:
        """Windows of images; those of equal size go through the backbone together."""
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for x in batched_inputs:
            groups.setdefault(tuple(x["image"].shape[-2:]), []).append(x)
        windows = []
        for size, group in groups.items():
            maps = self._maps(torch.stack([x["image"].to(self.device) for x in group]))
            crowds = [x.get("crowd_masks") for x in group]
            windows.append(
                self.head.training_windows(
                    maps,
                    [size] * len(group),
                    [x["instances"].to(self.device) for x in group],
                    [None if crowd is None else crowd.to(self.device) for crowd in crowds],
                )
            )
        return TrainingWindows.cat(windows)

    def _patch_windows(self, batched_inputs: list[dict[str, Any]]) -> TrainingWindows:
        """The window in the middle of each patch."""
        if any("patches" not in x for x in batched_inputs):
            raise KeyError(
                "MODEL.INSTANCE_FCN.TRAIN_ON crop needs 'patches': INPUT.MAPPER DeepMaskPatchMapper"
            )
        patches, masks, labels = (
            torch.cat([x[name].to(self.device) for x in batched_inputs])
            for name in ("patches", "patch_masks", "patch_labels")
        )
        for name, found, needed in (
            ("patches", patches, self.crop.patch_size),
            ("patch_masks", masks, self.head.m),
        ):
            if tuple(found.shape[-2:]) != (needed, needed):
                raise ValueError(
                    f"{name} must be {needed} x {needed}, not {tuple(found.shape[-2:])}"
                )
        return self.head.patch_windows(self._maps(patches), self.center_cell, masks, labels)

    def test_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Heights and widths, all different, of the pyramid's images of an image of that size."""
        if not self.short_sides:
            return [size]
        most = self.max_size / max(size)
        sizes = [scaled_size(size, min(side / min(size), most)) for side in self.short_sides]
        return list(dict.fromkeys(sizes))

    @torch.no_grad()
    def _infer(self, x: dict[str, Any]) -> dict[str, Instances]:
        image = x["image"].to(self.device)
        size = tuple(image.shape[-2:])
        output_size = (x.get("height", size[0]), x.get("width", size[1]))
        logits, masks = [], []
        for resized in self.test_sizes(size):
            maps = self._maps(resize_image(image, resized)[None])
            (found,) = self.head.ranked_windows(maps, [resized], self.pre_nms_topk)
            boxes = to_output(found.boxes, resized, output_size)
            logits.append(found.scores)
            masks.append(
                WindowMasks(found.masks, boxes, output_size, self.proposals.mask_threshold)
            )
        proposals = make_proposals(WindowMasks.cat(masks), torch.cat(logits), self.proposals)
        return as_outputs(proposals)
