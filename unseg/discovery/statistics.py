"""What a set of pseudo-masks looks like: counts, areas, why candidates were dropped, warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from unseg.structures import ImageRecord

# Upper ends of the area histogram, as fractions of the image.
AREA_BINS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_IMAGE_SIZED = 0.9  # a mask above this fraction of the image is no object
_STRIP_LENGTH, _STRIP_WIDTH = 0.8, 0.1  # a strip: long along a border, narrow across it
_TOLERATED = 0.2  # share of degenerate masks that is not worth a warning
_EMPTY_TOLERATED = 0.5  # share of images without masks that is not worth a warning


@dataclass
class MaskStatistics:
    """Counts over the records that were added."""

    images: int = 0
    images_without_masks: int = 0
    masks: int = 0
    image_sized: int = 0
    edge_strips: int = 0
    areas: np.ndarray = field(default_factory=lambda: np.zeros(len(AREA_BINS), dtype=np.int64))
    dropped: Counter = field(default_factory=Counter)
    unreadable_images: int = 0

    def add(self, record: ImageRecord) -> None:
        """Count one image."""
        self.images += 1
        self.images_without_masks += not record.masks
        for mask in record.masks:
            fraction = mask.area / (record.height * record.width)
            self.masks += 1
            self.areas[np.searchsorted(AREA_BINS, fraction)] += 1
            self.image_sized += fraction > _IMAGE_SIZED
            self.edge_strips += _is_edge_strip(mask.box, record.height, record.width)

    def warnings(self) -> list[str]:
        """One sentence for each way in which the masks look degenerate."""
        found = []
        if self.images_without_masks > _EMPTY_TOLERATED * self.images:
            found.append(
                f"{self.images_without_masks} of {self.images} images have no mask: are the "
                "weights loaded, and is the score threshold right for these features?"
            )
        for count, what in (
            (self.image_sized, "cover nearly the whole image"),
            (self.edge_strips, "are strips along the image border"),
        ):
            if count > _TOLERATED * self.masks:
                found.append(
                    f"{count} of {self.masks} masks {what}: the features do not tell objects from "
                    "background (wrong weights, wrong channel order or padding?)"
                )
        return found

    def to_json(self) -> dict[str, Any]:
        """All counts, as JSON-able numbers; equal for equal counts, whatever their order was."""
        counts = {f.name: getattr(self, f.name) for f in fields(self)}
        counts["areas"] = self.areas.tolist()
        counts["dropped"] = {name: n for name, n in sorted(self.dropped.items()) if n}
        return counts

    def summary(self) -> str:
        """A few lines for people."""
        per_image = self.masks / max(1, self.images)
        lines = [
            f"{self.images} images, {self.masks} masks ({per_image:.2f} per image), "
            f"{self.images_without_masks} images without masks"
        ]
        if self.unreadable_images:
            lines.append(f"{self.unreadable_images} images could not be read and were left out")
        shares = self.areas / max(1, self.masks)
        bins = [f"<={b:.1%}: {share:.0%}" for b, share in zip(AREA_BINS, shares, strict=True)]
        lines.append("area in fractions of the image: " + ", ".join(bins))
        if self.dropped:
            reasons = ", ".join(f"{name} {n}" for name, n in sorted(self.dropped.items()) if n)
            lines.append(f"candidates dropped: {reasons}")
        return "\n".join(lines)


def _is_edge_strip(box: list[float], height: int, width: int) -> bool:
    x, y, w, h = box
    along_side = h >= _STRIP_LENGTH * height and w <= _STRIP_WIDTH * width
    along_top = w >= _STRIP_LENGTH * width and h <= _STRIP_WIDTH * height
    touches_side = x == 0 or x + w == width
    touches_top = y == 0 or y + h == height
    return (along_side and touches_side) or (along_top and touches_top)


def mask_statistics(
    records: Iterable[ImageRecord], dropped: Mapping[str, int] | None = None
) -> MaskStatistics:
    """Statistics of a whole set.

    Args:
        records: the images.
        dropped: why candidates were dropped on the way, with counts.
    """
    statistics = MaskStatistics(dropped=Counter(dropped or {}))
    for record in records:
        statistics.add(record)
    return statistics
