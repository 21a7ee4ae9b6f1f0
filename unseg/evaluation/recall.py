"""Recall of ranked proposals at many caps at once, by COCO's one-to-one matching.

COCOeval lets every proposal, by falling score, take the free object of highest IoU. Two facts make
the recall of it cheap:

- A cap on the proposals only ends the matching earlier. One run without a cap gives, for every
  object, the rank of the proposal that takes it, and recall at n is the share of ranks below n.
- Objects that are not counted (crowds, and those of another size) never change which counted object
  a proposal takes: COCOeval offers them only to proposals that no counted object is left for. So
  for recall they are left out.

What is kept of an image is therefore a few integers per object, however many proposals it has.

Source: Lin et al., Microsoft COCO, 2014, as implemented by pycocotools' COCOeval with
``useCats=0``; the area under the curve is named in Pinheiro et al., Learning to Segment Object
Candidates, 2015, which does not give its grid (see :func:`area_under_curve`).

Legend: N proposals by falling score, G objects, A size ranges (all, small, medium, large), T IoU
thresholds (.50:.05:.95), M caps on proposals per image.
"""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_util

from unseg.layers import PackedMasks, mask_iou

# As pycocotools computes them: a threshold must be the same float64.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Bounds of an object's area in pixels, both included, by COCO's suffix of the size.
AREA_RANGES = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
# COCOeval lets no threshold ask for more than this.
_HIGHEST_THRESHOLD = 1 - 1e-10

# The rank of an object that no proposal takes.
NEVER = np.iinfo(np.int32).max

# The caps of the area under the curve: 1 to 1000, ten to a decade.
AUC_COUNTS = tuple(sorted({round(10 ** (j / 10)) for j in range(31)}))


def check_caps(caps: Sequence[int]) -> tuple[int, ...]:
    """The caps, rising, each once.

    Raises:
        ValueError: a cap is not a positive integer, or there is none.
    """
    values = list(caps)
    if not values or any(isinstance(c, bool) or int(c) != c or not 1 <= c < NEVER for c in values):
        raise ValueError(f"caps must be positive integers, got {caps!r}")
    return tuple(sorted({int(c) for c in values}))


def exact_mask_iou(masks: PackedMasks, objects: PackedMasks) -> np.ndarray:
    """IoU of all pairs as the float64 quotient of two integers, 0 where both masks are empty.

    float32 quotients will not do: those of exactly .65, .70, .90 and .95 fail their threshold.

    Args:
        masks: N masks.
        objects: G masks of the same size, pixel order and device.

    Returns:
        float64 (N, G).

    Raises:
        ValueError: masks of different sizes or orders.
    """
    inter = mask_iou(masks, objects, mode="inter").cpu().numpy().astype(np.int64)
    areas, object_areas = (m.area.cpu().numpy().astype(np.int64) for m in (masks, objects))
    union = areas[:, None] + object_areas[None] - inter
    return inter / np.maximum(union, 1)


def exact_box_iou(boxes: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """IoU of all pairs of boxes by pycocotools' formula in float64.

    Args:
        boxes: (N, 4) XYWH in pixels.
        objects: (G, 4), likewise.

    Returns:
        float64 (N, G).
    """
    if not len(boxes) or not len(objects):
        return np.zeros((len(boxes), len(objects)))
    no_crowds = np.zeros(len(objects), dtype=np.uint8)
    return mask_util.iou(
        np.ascontiguousarray(boxes, dtype=np.float64),
        np.ascontiguousarray(objects, dtype=np.float64),
        no_crowds,
    )


def counted_by_size(areas: np.ndarray) -> np.ndarray:
    """Which objects each size range counts; an area on a border belongs to both sides.

    Args:
        areas: (G,) annotated areas of objects that are not crowds.

    Returns:
        bool (A, G).
    """
    areas = np.asarray(areas, dtype=np.float64)
    return np.stack([(areas >= low) & (areas <= high) for low, high in AREA_RANGES.values()])


def match_ranks(
    iou: np.ndarray, counted: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS
) -> np.ndarray:
    """The rank of the proposal that takes each object of one image.

    Every proposal, in order, takes the free counted object of highest IoU, if that is at least the
    threshold; of equal IoUs the last object.

    Args:
        iou: float64 (N, G), rows by falling score.
        counted: bool (A, G): matching is done for each row apart, with its objects alone.
        thresholds: (T,) > 0.

    Returns:
        int32 (A, T, G): ranks from 0; NEVER for objects that stay free or are not counted.

    Raises:
        ValueError: shapes that do not fit, NaN among the IoUs.
    """
    iou, counted = np.asarray(iou, dtype=np.float64), np.asarray(counted, dtype=bool)
    if iou.ndim != 2 or counted.ndim != 2 or iou.shape[1] != counted.shape[1]:
        raise ValueError(f"iou {iou.shape} must be (N, G), counted {counted.shape} (A, G)")
    if np.isnan(iou).any():
        raise ValueError("iou must not be NaN")
    limits = np.minimum(np.asarray(thresholds, dtype=np.float64), _HIGHEST_THRESHOLD)
    ranks = np.full((len(counted), len(limits), iou.shape[1]), NEVER, dtype=np.int32)
    if not iou.size or not len(limits):
        return ranks
    # Most proposals are near no object.
    rows = np.flatnonzero((iou >= limits.min()).any(axis=1))
    near = iou[rows]
    for a, members in enumerate(counted):
        columns = np.flatnonzero(members)
        own = near[:, columns]
        for t, limit in enumerate(limits):
            taken = _take(own, limit)
            found = taken >= 0
            ranks[a, t, columns[found]] = rows[taken[found]]
    return ranks


def _take(iou: np.ndarray, limit: float) -> np.ndarray:
    """Row that takes each column, -1 for none; (N, G) to int64 (G,)."""
    hits = iou >= limit
    if not hits.any():
        return np.full(iou.shape[1], -1)
    choices = hits.sum(axis=1)
    if choices.max() == 1:  # nobody has a choice: the first one gets it
        return np.where(hits.any(axis=0), hits.argmax(axis=0), -1)
    taken = [-1] * iou.shape[1]
    for row in np.flatnonzero(choices).tolist():
        best, highest = -1, limit
        values = iou[row].tolist()
        for column in np.flatnonzero(hits[row]).tolist():
            if taken[column] < 0 and values[column] >= highest:
                best, highest = column, values[column]
        if best >= 0:
            taken[best] = row
    return np.asarray(taken)


def average_recall(ranks: np.ndarray, counted: np.ndarray, caps: Sequence[int]) -> np.ndarray:
    """Average recall over the thresholds, pooled over all objects of all images.

    Args:
        ranks: int32 (A, T, G) of :func:`match_ranks`, of all images side by side.
        counted: bool (A, G): how many of them are the denominator.
        caps: the M caps.

    Returns:
        float64 (A, M) in [0, 1], NaN where no object is counted.
    """
    recall = np.full((len(counted), ranks.shape[1], len(caps)), np.nan)
    for a, members in enumerate(counted):
        if members.any():
            rising = np.sort(ranks[a][:, members], axis=1)
            below = np.stack([np.searchsorted(row, np.asarray(caps)) for row in rising])
            recall[a] = below / members.sum()
    return recall.mean(axis=1)


def area_under_curve(ranks: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Average recall averaged over log10 of the number of proposals, from 1 to 1000.

    The papers do not print their grid. Ours is `AUC_COUNTS` with trapezoids between: of the grids
    that were tried, the one that all rows of DeepMask's published tables are compatible with.

    Args:
        ranks, counted: see :func:`average_recall`.

    Returns:
        float64 (A,) in [0, 1], NaN where no object is counted.
    """
    curve = average_recall(ranks, counted, AUC_COUNTS)
    places = np.log10(AUC_COUNTS)
    return np.trapezoid(curve, places, axis=1) / (places[-1] - places[0])
