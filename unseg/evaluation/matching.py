"""Matching of predicted and true label maps.

Legend: h w a label map's size, K predicted and M true instances, n m any two numbers of things.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def hungarian(scores: np.ndarray) -> list[tuple[int, int]]:
    """The one-to-one matching of the largest sum.

    Args:
        scores: (n, m), finite.

    Returns:
        min(n, m) pairs of a row and a column, by rising row.

    Raises:
        ValueError: the scores are not a matrix of finite numbers.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite and of shape (n, m), got {scores.shape}")
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return list(zip(rows.tolist(), columns.tolist()))


def confusion_of_labels(pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """How many pixels have each pair of labels, from one count over the pixels.

    Args:
        pred, gt: (h, w) integers >= 0, small ones, 0 the background. Labels need not be contiguous.

    Returns:
        (K + 1, M + 1) int64: the background, whether there or not, then the labels that are there,
        by rising number.

    Raises:
        ValueError: the maps are not integers, have values below 0 or differ in shape.
    """
    pred, gt = np.asarray(pred), np.asarray(gt)
    if pred.shape != gt.shape:
        raise ValueError(f"pred {pred.shape} and gt {gt.shape} must have the same shape")
    (pred_ranks, pred_count), (gt_ranks, gt_count) = _ranks(pred, "pred"), _ranks(gt, "gt")
    counts = np.bincount(pred_ranks * gt_count + gt_ranks, minlength=pred_count * gt_count)
    return counts.reshape(pred_count, gt_count)


def _ranks(labels: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """Flat labels numbered without gaps from the background's 0, and how many there are."""
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"{name} must hold integers of 0 or more, got {labels.dtype} values")
    flat = labels.ravel().astype(np.int64)
    present = np.flatnonzero(np.bincount(flat, minlength=1))
    present = present[present > 0]
    ranks = np.zeros(int(flat.max(initial=0)) + 1, dtype=np.int64)
    ranks[present] = np.arange(1, len(present) + 1)
    return ranks[flat], len(present) + 1


def iou_of_confusion(confusion: np.ndarray) -> np.ndarray:
    """IoU of every predicted with every true instance, (K, M) float64.

    Args:
        confusion: (K + 1, M + 1) of :func:`confusion_of_labels`: every instance has pixels.
    """
    inter = confusion[1:, 1:]
    return inter / (confusion.sum(1)[1:, None] + confusion.sum(0)[None, 1:] - inter)


def miou_of_confusion(confusion: np.ndarray) -> float:
    """:func:`frame_miou` from (K + 1, M + 1) counts of :func:`confusion_of_labels`."""
    iou = iou_of_confusion(confusion)
    if not iou.shape[1]:
        return float("nan")
    return float(sum(iou[pair] for pair in hungarian(iou)) / iou.shape[1])


def f_score_of_confusion(confusion: np.ndarray) -> float:
    """:func:`foreground_f_score` from (K + 1, M + 1) counts of :func:`confusion_of_labels`."""
    predicted, annotated = confusion[1:].sum(), confusion[:, 1:].sum()
    if not annotated:
        return float("nan")
    return float(2 * confusion[1:, 1:].sum() / (predicted + annotated))


def pairwise_iou_of_labels(pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """IoU of every predicted with every true instance of two label maps.

    Args:
        pred, gt: (h, w), see :func:`confusion_of_labels`.

    Returns:
        (K, M) float64, for the labels above 0 that are in the maps, by rising number.
    """
    return iou_of_confusion(confusion_of_labels(pred, gt))


def frame_miou(pred: np.ndarray, gt: np.ndarray) -> float:
    """Mean IoU of the true instances of one frame under the best one-to-one matching.

    The sum of the matched IoUs over M: instances that nothing is matched with count 0, and
    predictions too many cost nothing.

    Args:
        pred, gt: (h, w), see :func:`confusion_of_labels`.

    Returns:
        in [0, 1]; NaN where there is no true instance.
    """
    return miou_of_confusion(confusion_of_labels(pred, gt))


def foreground_f_score(pred: np.ndarray, gt: np.ndarray) -> float:
    """F1 of the foreground, all instances together, of one frame.

    Args:
        pred, gt: (h, w), see :func:`confusion_of_labels`.

    Returns:
        2 TP / (2 TP + FP + FN) over pixels, in [0, 1]; NaN where there is no true instance.
    """
    return f_score_of_confusion(confusion_of_labels(pred, gt))
