"""Exemplar knowledge abstraction: objects cut out of images, without labels of where they are
(Ishtiak, En and Guo, "Exemplar-FreeSOLO: Enhancing Unsupervised Instance Segmentation with
Exemplars", CVPR 2023).

The paper: GrabCut finds a coarse foreground, which is cropped; a trained FreeSOLO refines its mask
on the crop; the exemplar is the crop times that mask. All numbers, how images are chosen, and what
happens where a step finds nothing are ours.

Legend: H W image, h w crop, N masks, C channels, M images.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode

from unseg.discovery.exemplar_pool import ExemplarError
from unseg.layers import mask_iou

# An RGB crop (h, w, 3) uint8 -> masks (N, h, w) bool and scores (N,) float.
Segmenter = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# GrabCut takes seconds for a photograph of some megapixels and milliseconds for one of this size.
_GRABCUT_SIDE = 512
# Components of its colour models; some versions of OpenCV fail on fewer pixels than that.
_GRABCUT_COLOURS = 5
# Initialisations of k-means; it keeps the best.
_KMEANS_STARTS = 3


@dataclass(frozen=True)
class ExemplarSettings:
    """How objects are cut out; all ours. See unseg/config/exemplar.py.

    Raises:
        ValueError: a value makes no sense; the message names its key.
    """

    grabcut_iterations: int = 5
    grabcut_margin: float = 0.1
    max_foreground: float = 0.95
    crop_pad: float = 0.1
    min_iou: float = 0.0
    short_side: int = 256
    max_side: int = 512
    background: tuple[int, int, int] = (124, 116, 104)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ExemplarSettings":
        """The settings of ``cfg.MODEL.EXEMPLAR.BUILD``; the background is the pixel mean."""
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be RGB or BGR, got {cfg.INPUT.FORMAT!r}")
        mean = tuple(round(value) for value in cfg.MODEL.PIXEL_MEAN)
        if len(mean) != 3 or not all(0 <= value <= 255 for value in mean):
            raise ValueError(f"MODEL.PIXEL_MEAN must be 3 numbers in 0..255, got {mean}")
        build = cfg.MODEL.EXEMPLAR.BUILD
        names = [field.name for field in fields(cls) if field.name != "background"]
        return cls(
            **{name: build[name.upper()] for name in names},
            background=mean[::-1] if cfg.INPUT.FORMAT == "BGR" else mean,
        )

    def __post_init__(self) -> None:
        limits = {
            "grabcut_iterations": ("at least 1", self.grabcut_iterations >= 1),
            "grabcut_margin": ("above 0 and below 0.5", 0 < self.grabcut_margin < 0.5),
            "max_foreground": ("above 0 and at most 1", 0 < self.max_foreground <= 1),
            "crop_pad": ("0 or more", 0 <= self.crop_pad < math.inf),
            "min_iou": ("in 0..1", 0 <= self.min_iou <= 1),
            "short_side": ("at least 1", self.short_side >= 1),
            "max_side": ("at least SHORT_SIDE", self.max_side >= self.short_side),
        }
        for name, (rule, holds) in limits.items():
            if not holds:
                key = f"MODEL.EXEMPLAR.BUILD.{name.upper()}"
                raise ValueError(f"{key} must be {rule}, got {getattr(self, name)}")


@dataclass(frozen=True)
class CutOut:
    """An object on a neutral background; the fields of :class:`unseg.structures.Exemplar`.

    Attributes:
        image: (h', w', 3) uint8 RGB, the resized crop.
        mask: (h', w') bool, never empty.
        box: (x0, y0, x1, y1), the crop in the image.
        mask_from: "refined", "coarse" or "whole".
    """

    image: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]
    mask_from: str


def coarse_foreground(image: np.ndarray, settings: ExemplarSettings) -> np.ndarray | None:
    """GrabCut's foreground, started from the image without its border.

    It runs on a copy of at most 512 px a side, so a mask's edge is that exact. The result depends
    on the image and the settings only: OpenCV's generator, of this thread, is seeded.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) bool, or None if GrabCut splits nothing: it finds no foreground, or more than
        ``max_foreground`` of what lies within the border, or cannot run (an image of a few pixels).

    Raises:
        ValueError: `image` is not (H, W, 3) uint8.
    """
    _check_image(image)
    height, width = image.shape[:2]
    small = _resize(image, min(1.0, _GRABCUT_SIDE / max(height, width)))
    margins = [max(1, round(settings.grabcut_margin * side)) for side in small.shape[:2]]
    inner = [side - 2 * margin for side, margin in zip(small.shape, margins)]
    if min(inner) < 1 or inner[0] * inner[1] < _GRABCUT_COLOURS:
        return None
    labels = np.zeros(small.shape[:2], dtype=np.uint8)
    rectangle = (margins[1], margins[0], inner[1], inner[0])
    cv2.setRNGSeed(0)  # its k-means draws from a generator that whoever ran before has advanced
    iterations = settings.grabcut_iterations
    cv2.grabCut(small, labels, rectangle, None, None, iterations, cv2.GC_INIT_WITH_RECT)
    found = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    # Of the inner part: with a border of 10 %, the whole inner part is but 64 % of the image.
    if found.sum() > settings.max_foreground * inner[0] * inner[1]:
        return None
    if found.shape != (height, width):
        found = cv2.resize(found.astype(np.float32), (width, height)) >= 0.5
    return found if found.any() else None


def cut_out(
    image: np.ndarray, coarse: np.ndarray | None, segment: Segmenter, settings: ExemplarSettings
) -> CutOut:
    """Crop the coarse foreground, refine its mask, and put it on a neutral background.

    Args:
        image: (H, W, 3) uint8 RGB.
        coarse: (H, W) bool from :func:`coarse_foreground`; None: the crop is the whole image.
        segment: finds masks in the crop, which it is given at its own size.

    Returns:
        the object, its shorter side ``short_side`` unless the longer one would exceed ``max_side``.
        The mask is the one with the highest score times IoU with the coarse one, or the coarse
        one where none overlaps it, or not by ``min_iou``. Without a coarse mask it is the one with
        the highest score, or everything.

    Raises:
        ValueError: wrong shapes or types, an empty `coarse`, scores that are not finite.
    """
    _check_image(image)
    height, width = image.shape[:2]
    box = (0, 0, width, height)
    if coarse is not None:
        if coarse.shape != (height, width) or coarse.dtype != bool or not coarse.any():
            raise ValueError(f"coarse must be a mask {(height, width)} bool that is not empty")
        box = _padded_box(coarse, settings.crop_pad)
    window = (slice(box[1], box[3]), slice(box[0], box[2]))
    crop = np.ascontiguousarray(image[window])
    coarse = None if coarse is None else coarse[window]
    mask, origin = _choose_mask(crop, coarse, segment, settings.min_iou)
    lone = np.where(mask[..., None], crop, np.array(settings.background, dtype=np.uint8))
    sides = crop.shape[:2]
    scale = min(settings.short_side / min(sides), settings.max_side / max(sides))
    share = _resize(mask.astype(np.float32), scale)
    # An object of a few pixels may nowhere fill half a pixel of the result.
    return CutOut(_resize(lone, scale), share >= min(0.5, share.max()), box, origin)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")


def _resize(array: np.ndarray, scale: float) -> np.ndarray:
    """(H, W) or (H, W, C) times `scale` in both directions, no side below 1."""
    height, width = (max(1, round(side * scale)) for side in array.shape[:2])
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(array, (width, height), interpolation=kind)


def _padded_box(mask: np.ndarray, pad: float) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) of a mask, wider by `pad` of its sides on each side of it."""
    x0, x1 = _padded_range(mask.any(axis=0), pad)
    y0, y1 = _padded_range(mask.any(axis=1), pad)
    return x0, y0, x1, y1


def _padded_range(occupied: np.ndarray, pad: float) -> tuple[int, int]:
    where = np.flatnonzero(occupied)
    begin, end = int(where[0]), int(where[-1]) + 1
    border = round(pad * (end - begin))
    return max(0, begin - border), min(len(occupied), end + border)


def _choose_mask(
    crop: np.ndarray, coarse: np.ndarray | None, segment: Segmenter, min_iou: float
) -> tuple[np.ndarray, str]:
    """The mask (h, w) of a crop's object, and where it is from."""
    masks, scores = segment(crop)
    if masks.dtype != bool or masks.shape != (len(scores), *crop.shape[:2]):
        wanted = f"({len(scores)}, {crop.shape[0]}, {crop.shape[1]}) bool"
        raise ValueError(f"segment must return masks {wanted}, got {masks.shape} {masks.dtype}")
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError("segment must return finite scores (N,)")
    if coarse is None:
        found = np.flatnonzero(masks.any(axis=(1, 2)))
        if not len(found):
            return np.ones(crop.shape[:2], dtype=bool), "whole"
        return masks[found[scores[found].argmax()]], "refined"
    if len(masks):
        candidates, reference = map(torch.tensor, (masks, coarse[None]))
        inside = mask_iou(candidates, reference, mode="inter")[:, 0].numpy()
        # Whole numbers: a float32 quotient can fail its own threshold.
        overlap = inside / (masks.sum(axis=(1, 2)) + coarse.sum() - inside)
        values = np.where(overlap >= min_iou, scores * overlap, 0.0)
        if values.max() > 0:
            return masks[values.argmax()], "refined"
    return coarse, "coarse"


def categories_in_folder(
    folder: str | os.PathLike, extensions: Sequence[str]
) -> dict[str, list[str]]:
    """The images of a folder of class folders. Hidden files and what is no image are passed over.

    Args:
        folder: holds one folder per class, with the images directly in it.
        extensions: of images, such as (".jpg", ".png"); capitals do not matter.

    Returns:
        {class: its images relative to `folder` ("class/x.jpg")}; both sorted by name.

    Raises:
        ExemplarError: no folder, no class folders, images beside them, one without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExemplarError(f"{folder}: no such folder of class folders")
    loose, classes = _list_folder(folder, extensions)
    if loose:
        raise ExemplarError(
            f"{folder}: images must lie in class folders; {len(loose)} do not, such as {loose[0]}"
        )
    if not classes:
        raise ExemplarError(f"{folder}: no class folders in it (expected class/*.jpg)")
    categories = {name: _list_folder(folder / name, extensions)[0] for name in classes}
    for name, images in categories.items():
        if not images:
            raise ExemplarError(f"{folder / name}: no images in this class folder")
    return {name: [f"{name}/{image}" for image in images] for name, images in categories.items()}


def _list_folder(folder: Path, extensions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sorted names of the images and of the folders in a folder."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry.name for entry in entries if entry.is_dir()]
    endings = {extension.lower() for extension in extensions}
    images = [e.name for e in entries if e.suffix.lower() in endings and not e.is_dir()]
    return images, folders


def choose_random(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` images at random; a larger count with the same seed adds to them.

    Returns:
        sorted, distinct indices.

    Raises:
        ExemplarError: `count` is below 1 or above `total`.
    """
    if count < 1:
        raise ExemplarError(f"{count} exemplars asked for; at least 1")
    if count > total:
        raise ExemplarError(f"{count} exemplars asked for, but there are only {total} images")
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def choose_medoids(
    features: np.ndarray, clusters: int, per_cluster: int, seed: int
) -> list[tuple[int, int]]:
    """The images nearest to the centres of a k-means clustering.

    Args:
        features: (M, C) float, one row an image.
        clusters: their number; fewer come out if fewer rows are distinct.
        per_cluster: images of each, or as many as it has.

    Returns:
        (cluster, image) pairs. Clusters count from 0 by falling size, those of equal size by their
        first image; in each the nearest image comes first.

    Raises:
        ExemplarError: fewer images than clusters, a number below 1, features that are not (M, C)
            or not finite.
    """
    # Here, as importing it takes longer than the rest of the package together.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if features.ndim != 2 or not np.isfinite(features).all():
        raise ExemplarError(f"features must be (images, C) and finite, got {features.shape}")
    if min(clusters, per_cluster) < 1:
        raise ExemplarError(f"{clusters} clusters with {per_cluster} images each; at least 1")
    if len(features) < clusters:
        raise ExemplarError(f"{clusters} clusters asked for, but only {len(features)} images")
    # One thread: sums in one order, and on few images the threads take longer than the work.
    with threadpool_limits(1):
        result = KMeans(clusters, n_init=_KMEANS_STARTS, random_state=seed).fit(features)
    offsets = features.astype(np.float64) - result.cluster_centers_[result.labels_]
    distances = np.square(offsets).sum(axis=1)
    members = [np.flatnonzero(result.labels_ == label) for label in range(clusters)]
    members = sorted((rows for rows in members if len(rows)), key=lambda r: (-len(r), r[0]))
    return [
        (cluster, int(row))
        for cluster, rows in enumerate(members)
        for row in rows[distances[rows].argsort(kind="stable")][:per_cluster]
    ]
