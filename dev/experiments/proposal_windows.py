"""What an InstanceFCN's masks look like in the windows that the ground truth calls positive.

Recall says how well the best of many proposals fit. This is about every window around an object
that touches another one: which of the window's cells the net takes for the object, whatever the
net thinks of the window. Cells are compared, not pixels, before any mask is pasted.

Legend: N windows, G objects of an image, m cells per side of a window, H W pixels.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from pycocotools import mask as mask_util
from torch import Tensor
from torchvision.ops import roi_align

from unseg.modeling.meta_arch.instance_fcn import InstanceFCN
from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead, LevelMaps
from unseg.modeling.proposals.instance_fcn_windows import assemble_windows, grid_cells
from unseg.modeling.proposals.pyramid import to_output
from unseg.structures import label_windows
from unseg.structures.canonical import POSITIVE


def cells_of_objects(masks: Tensor, boxes: Tensor, m: int) -> Tensor:
    """Cells of windows more than half of which an object covers: bool (N, G, m, m).

    Args:
        masks: bool (G, H, W).
        boxes: float32 (N, 4) XYXY, the windows; they may leave the image.
        m: see the legend.
    """
    # A ring of zeros: roi_align repeats the border for one pixel.
    padded = F.pad(masks[None].float(), (1, 1, 1, 1))
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes + 1], dim=1)
    return roi_align(padded, rois, (m, m), aligned=True) > 0.5


def score_masks(found: Tensor, cells: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How well masks fit their objects, and how much of other objects they take.

    Args:
        found: bool (N, m, m), the masks.
        cells: bool (N, G, m, m) of :func:`cells_of_objects`.
        own: int64 (N,), which object each window is of.

    Returns:
        float64 (N,) each: IoU with the object; share of the cells of all other objects that are in
        the mask, NaN for windows without such cells.
    """
    target = cells[torch.arange(len(found)), own]
    foreign = cells.any(dim=1) & ~target
    both, either, taken, there = (
        x.flatten(1).sum(dim=1).double()
        for x in (found & target, found | target, found & foreign, foreign)
    )
    return both / either.clamp(min=1), taken / there  # 0 / 0 is NaN


def positive_windows(
    head: InstanceFCNHead,
    maps: Sequence[LevelMaps],
    resized: tuple[int, int],
    masks: Tensor,
    boxes: Tensor,
    chosen: Tensor,
    threshold: float = 0.5,
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`score_masks` of the positive windows of chosen objects, level by level.

    Args:
        head: that made the maps.
        maps: of each level, of one image (B = 1).
        resized: (H, W) of the image that the maps are of, without padding.
        masks: bool (G, H, W), all objects of the image in its own size.
        boxes: float32 (G, 4) XYXY, their tight boxes.
        chosen: bool (G,).
        threshold: probability from which a cell is in a mask.
    """
    original = tuple(masks.shape[1:])
    boxes = to_output(boxes, original, resized)
    for level, found in zip(head.levels, maps, strict=True):
        size = level.cells_inside(resized, tuple(found.scores.shape[-2:]))
        cells = grid_cells(*size, boxes.device)
        rule = head.window_training.rule(level.object_size)
        labels, matched = label_windows(level.centers(cells), 0.0, boxes, rule)
        positive = labels == POSITIVE
        positive[positive.clone()] = chosen[matched[positive]]
        cells, own = cells[positive], matched[positive]
        locations = torch.cat([torch.zeros_like(cells[:, :1]), cells], dim=1)
        logits, _ = assemble_windows(found.masks, locations, [size], head.k, head.m, head.pad_logit)
        windows = to_output(level.boxes(cells, head.m), resized, original)
        yield score_masks(
            logits.sigmoid() >= threshold, cells_of_objects(masks, windows, head.m), own
        )


class WindowMeasure:
    """Means over the positive windows of touching objects, at all scales of the test pyramid.

    It listens to the model's head while the model is applied to one image after the other.
    """

    def __init__(self, model: InstanceFCN, name: str) -> None:
        """
        Args:
            model: in eval mode.
            name: a synthetic data set, whose annotations say whether an object touches another one.
        """
        self._model = model
        self._records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._maps: list[list[LevelMaps]] = []
        # One call for each scale, in their order.
        model.head.register_forward_hook(lambda _, __, made: self._maps.append(made))

    def add(self, image_id: Hashable) -> None:
        """Score the windows of the image that the model has just been applied to."""
        self._scores += _score_image(self._model, self._maps, self._records[image_id])
        self._maps.clear()

    def numbers(self) -> dict[str, float]:
        """In percent "window IoU" and "foreign", see :func:`score_masks`; NaN without windows."""
        empty = (torch.zeros(0), torch.zeros(0))
        ious, foreign = (torch.cat(part) for part in zip(empty, *self._scores))
        return {
            "window IoU": float(100 * ious.double().mean()),
            "foreign": float(100 * foreign.double().nanmean()),
        }


def _score_image(
    model: InstanceFCN, maps: Sequence[Sequence[LevelMaps]], record: dict
) -> list[tuple[Tensor, Tensor]]:
    """Scores of all scales and levels."""
    annotations = record["annotations"]
    if not annotations:
        return []
    size = (record["height"], record["width"])
    encoded = [annotation["segmentation"] for annotation in annotations]
    masks = torch.from_numpy(mask_util.decode(encoded).transpose(2, 0, 1).astype(bool))
    boxes = torch.from_numpy(np.array([a["bbox"] for a in annotations], np.float32))
    boxes[:, 2:] += boxes[:, :2]  # from XYWH
    chosen = torch.tensor([annotation["touching"] for annotation in annotations])
    threshold = model.proposals.mask_threshold
    return [
        scored
        for resized, of_scale in zip(model.test_sizes(size), maps, strict=True)
        for scored in positive_windows(
            model.head, of_scale, resized, masks, boxes, chosen, threshold
        )
    ]
