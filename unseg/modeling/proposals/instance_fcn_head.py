"""InstanceFCN's two branches: k*k instance-sensitive score maps and the windows' objectness.

Dai et al., "Instance-sensitive fully convolutional networks" (2016), section 3.

Legend: B images, C channels, N windows, P positives among them, k bins and m cells per side of a
window, h w cells of a map, L levels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Instances
from torch import Tensor, nn

from unseg.modeling.proposals.instance_fcn_losses import (
    TrainingWindows,
    WindowTraining,
    crop_targets,
    sample_windows,
    window_losses,
)
from unseg.modeling.proposals.instance_fcn_windows import (
    WindowLevel,
    assemble_windows,
    make_levels,
)


class LevelMaps(NamedTuple):
    """Of one level: `masks` (B, k*k, h, w) and `scores` (B, h, w), logits."""

    masks: Tensor
    scores: Tensor


class RankedWindows(NamedTuple):
    """Of one image: `scores` (N,) logits, falling within a level; `masks` (N, m, m) probabilities;
    and `boxes` (N, 4) XYXY in pixels of the image that the maps are of, which they may leave. All
    float32."""

    scores: Tensor
    masks: Tensor
    boxes: Tensor


def _check(k: int, m: int, hidden: int) -> None:
    """Raise a ValueError that names the config's key."""
    if m < 1 or m % 2 == 0:
        raise ValueError(f"MODEL.INSTANCE_FCN.M must be odd and positive: {m}")
    if not 1 <= k <= m:
        raise ValueError(f"MODEL.INSTANCE_FCN.K must be in 1..M, which is {m}: {k}")
    if hidden < 1:
        raise ValueError(f"MODEL.INSTANCE_FCN.HIDDEN must be positive: {hidden}")


class InstanceFCNHead(nn.Module):
    """Both branches, shared by all levels, with what is done to their windows.

    Images may be padded at the bottom and at the right: what is beyond an image is outside its map.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: int,
        levels: Sequence[WindowLevel],
        k: int = 5,
        m: int = 21,
        hidden: int = 512,
        pad_logit: float = -10.0,
        training: WindowTraining | None = None,
    ):
        """
        Args:
            in_features: names of the L maps that are read.
            in_channels: C of each of them.
            levels: their geometry.
            k, m: see the legend; m is odd.
            hidden: channels of both branches' first convolution.
            pad_logit: of cells outside the map.
            training: how windows are sampled and compared; None: as in the paper.

        Raises:
            ValueError: one of them has no such value; the message names the config's key.
        """
        super().__init__()
        _check(k, m, hidden)
        if len(in_features) != len(levels):
            raise ValueError(f"{len(in_features)} in_features, but {len(levels)} levels")
        self.in_features, self.levels = tuple(in_features), tuple(levels)
        self.k, self.m, self.pad_logit = k, m, pad_logit
        self.window_training = training or WindowTraining()
        self.mask_branch = nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, k * k, kernel_size=3, padding=1),
        )
        self.score_branch = nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 1, kernel_size=1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        input_shape: Mapping[str, ShapeSpec],
        cell_offsets: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        node = cfg.MODEL.INSTANCE_FCN
        levels = make_levels(
            input_shape, node.IN_FEATURES, node.M, node.OBJECT_SIZE, node.CELL_OFFSET, cell_offsets
        )
        channels = {input_shape[name].channels for name in node.IN_FEATURES}
        if len(channels) > 1:
            raise ValueError(
                f"MODEL.INSTANCE_FCN.IN_FEATURES must have equal channels: {sorted(channels)}"
            )
        return {
            "in_features": node.IN_FEATURES,
            "in_channels": channels.pop(),
            "levels": levels,
            "k": node.K,
            "m": node.M,
            "hidden": node.HIDDEN,
            "pad_logit": node.PAD_LOGIT,
            "training": WindowTraining.from_node(node),
        }

    def forward(self, features: Mapping[str, Tensor]) -> list[LevelMaps]:
        """
        Args:
            features: holds the L maps (B, C, h, w).
        """
        return [
            LevelMaps(self.mask_branch(x), self.score_branch(x)[:, 0])
            for x in (features[name] for name in self.in_features)
        ]

    def _sizes(
        self, maps: Sequence[LevelMaps], image_sizes: Sequence[tuple[int, int]]
    ) -> list[list[tuple[int, int]]]:
        """Per level and image the rows and columns that are of the image."""
        return [
            [level.cells_inside(size, tuple(found.scores.shape[-2:])) for size in image_sizes]
            for level, found in zip(self.levels, maps, strict=True)
        ]

    def training_windows(
        self,
        maps: Sequence[LevelMaps],
        image_sizes: Sequence[tuple[int, int]],
        instances: Sequence[Instances],
        crowds: Sequence[BitMasks | None] | None = None,
    ) -> TrainingWindows:
        """Windows sampled from B images, with their targets.

        Args:
            maps: of each level.
            image_sizes: height and width of the images without padding.
            instances: the images' objects: gt_boxes, gt_masks (BitMasks or PolygonMasks).
            crowds: the images' crowd regions.

        Raises:
            ValueError: objects have no masks.
        """
        sizes = self._sizes(maps, image_sizes)
        crowds = crowds or [None] * len(instances)
        samples = [
            sample_windows(self.levels, of_image, objects, crowd, self.window_training)
            for of_image, objects, crowd in zip(
                zip(*sizes, strict=True), instances, crowds, strict=True
            )
        ]
        parts = []
        for index, (level, found) in enumerate(zip(self.levels, maps, strict=True)):
            parts += [
                self._compare(found, level, sizes[index], image, *sample[index], instances[image])
                for image, sample in enumerate(samples)
            ]
        return TrainingWindows.cat(parts)

    def _compare(
        self,
        maps: LevelMaps,
        level: WindowLevel,
        sizes: Sequence[tuple[int, int]],
        image: int,
        cells: Tensor,
        objects: Tensor,
        instances: Instances,
    ) -> TrainingWindows:
        """Windows of an image at a level around cells (N, 2), holding objects (N,) or -1."""
        labels = objects >= 0
        locations = torch.cat([torch.full_like(cells[:, :1], image), cells], dim=1)
        boxes = level.boxes(cells[labels], self.m)
        if len(boxes):
            targets = crop_targets(instances.gt_masks, objects[labels], boxes, self.m)
        else:
            targets = labels.new_zeros((0, self.m, self.m))
        return self._windows(maps, locations, labels, sizes, targets)

    def _windows(
        self,
        maps: LevelMaps,
        locations: Tensor,
        labels: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: Tensor,
    ) -> TrainingWindows:
        """Windows of a level at locations (N, 3), labelled (N,), the positives' masks (P, m, m)."""
        scores = maps.scores[tuple(locations.T)].float()
        masks, inside = assemble_windows(
            maps.masks, locations[labels], sizes, self.k, self.m, self.pad_logit
        )
        return TrainingWindows(scores, labels, masks, inside, targets)

    def patch_windows(
        self, maps: Sequence[LevelMaps], cell: int, masks: Tensor, labels: Tensor
    ) -> TrainingWindows:
        """One window of each of B square patches, of a head with one level.

        Args:
            maps: of the level.
            cell: row and column of the windows' centre.
            masks: (B, m, m), positive on the object; those of negatives are not read.
            labels: (B,), positive for positives.
        """
        found = maps[0]
        count = len(labels)
        centers = torch.full((count,), cell, device=labels.device)
        images = torch.arange(count, device=labels.device)
        locations = torch.stack([images, centers, centers], dim=1)
        sizes = [tuple(found.scores.shape[-2:])] * count
        return self._windows(found, locations, labels > 0, sizes, masks[labels > 0] > 0)

    def losses(self, windows: TrainingWindows) -> dict[str, Tensor]:
        """See :func:`unseg.modeling.proposals.instance_fcn_losses.window_losses`."""
        return window_losses(windows, self.window_training)

    @torch.no_grad()
    def ranked_windows(
        self, maps: Sequence[LevelMaps], image_sizes: Sequence[tuple[int, int]], topk: int
    ) -> list[RankedWindows]:
        """Per image the windows of highest objectness, at most `topk` of each level.

        Of equal ones the first in the order of rows counts. Only these windows are assembled.

        Args:
            maps: of each level.
            image_sizes: height and width of the images without padding.
            topk: at least 1.
        """
        sizes = self._sizes(maps, image_sizes)
        found: list[list[RankedWindows]] = [[] for _ in image_sizes]
        for level, level_maps, of_level in zip(self.levels, maps, sizes, strict=True):
            for image, (rows, columns) in enumerate(of_level):
                scores = level_maps.scores[image, :rows, :columns].float().flatten()
                order = scores.argsort(descending=True, stable=True)[:topk]
                cells = torch.stack([order // columns, order % columns], dim=1)
                locations = torch.cat([torch.full_like(cells[:, :1], image), cells], dim=1)
                masks, _ = assemble_windows(
                    level_maps.masks, locations, of_level, self.k, self.m, self.pad_logit
                )
                boxes = level.boxes(cells, self.m)
                found[image].append(RankedWindows(scores[order], masks.sigmoid(), boxes))
        return [
            RankedWindows(*(torch.cat(parts) for parts in zip(*of_image, strict=True)))
            for of_image in found
        ]
