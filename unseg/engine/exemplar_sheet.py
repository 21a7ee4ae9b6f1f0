"""The contact sheet of an exemplar pool: each object beside the image that it is from.

Legend: K exemplars, H W image, h w sheet.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unseg.structures import Exemplar, ExemplarPool

PICTURE_SIDE = 96  # pixels, of the squares that pictures lie in
_SMALL_SIDE = 64  # of them in sheets of many
_MANY = 240
_MOST = 1200  # more are not shown: image viewers refuse such pictures
_GAP = 12  # between tiles
_CAPTION = 18
_MARGIN = 16
_HEADER = 46
_MAX_COLUMNS = 16

_PAPER = (255, 255, 255)
_MAT = (236, 237, 240)  # behind pictures that are not square
_INK = (33, 37, 41)
_FADED = (110, 116, 124)
_RULE = (206, 210, 216)
# Distinct for colour-blind eyes as well, and on photographs.
_COLORS = {"refined": (60, 220, 90), "coarse": (255, 176, 0), "whole": (255, 64, 129)}
_EXPLANATIONS = {
    "refined": "refined by the model",
    "coarse": "GrabCut's",
    "whole": "whole image",
}


@dataclass(frozen=True)
class SourceView:
    """A small copy of the image that an exemplar is from.

    Attributes:
        image: uint8 RGB, no side above :data:`PICTURE_SIDE`.
        size: (H, W) of the image itself.
    """

    image: np.ndarray
    size: tuple[int, int]


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """An (H, W, 3) uint8 image, scaled so that its longer side is `side`, if it is longer."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def draw_exemplar_sheet(
    pool: ExemplarPool, sources: Sequence[SourceView] | None = None
) -> np.ndarray:
    """All exemplars (the first 1200) by category.

    Args:
        pool: K exemplars.
        sources: K views of the images they are from, to be shown on their left with the crop's box
            and the mask's outline; None: the objects alone.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    exemplars = pool.exemplars[:_MOST]
    grid = _Grid.for_exemplars(exemplars, 1 if sources is None else 2)
    sheet = Image.new("RGB", grid.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_header(draw, pool, len(exemplars))
    places = list(grid.places(exemplars))
    for index, (exemplar, (row, column)) in enumerate(zip(exemplars, places, strict=True)):
        x, y = grid.corner(row, column)
        if sources is not None:
            sheet.paste(_draw_source(exemplar, sources[index], grid.side), (x, y))
            x += grid.side + 2
        sheet.paste(_on_mat(_shrunk_object(exemplar, grid.side), grid.side), (x, y))
    _draw_captions(draw, exemplars, places, grid)
    return np.asarray(sheet)


@dataclass(frozen=True)
class _Grid:
    """Where tiles are; exemplars of one category share a row if it is long enough for them."""

    side: int
    pictures: int  # per tile
    columns: int
    rows: int
    group: int  # tiles kept for a category

    @classmethod
    def for_exemplars(cls, exemplars: Sequence[Exemplar], pictures: int) -> "_Grid":
        counts = Counter(exemplar.category for exemplar in exemplars)
        side = PICTURE_SIDE if len(exemplars) <= _MANY else _SMALL_SIDE
        width, height = pictures * side + _GAP, side + _CAPTION + _GAP
        columns = round(math.sqrt(1.4 * len(exemplars) * height / width))
        columns = min(max(columns, 4), _MAX_COLUMNS, max(len(exemplars), 2))
        group = max(counts.values())
        if group > _MAX_COLUMNS:
            group = 1
        columns = max(columns // group, 1) * group
        cells = sum(math.ceil(count / group) * group for count in counts.values())
        return cls(side, pictures, columns, math.ceil(cells / columns), group)

    @property
    def tile_width(self) -> int:
        return self.pictures * (self.side + 2) - 2

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        width = 2 * _MARGIN + self.columns * (self.tile_width + _GAP) - _GAP
        height = _MARGIN + _HEADER + self.rows * (self.side + _CAPTION + _GAP)
        return max(width, 420), height

    def places(self, exemplars: Sequence[Exemplar]) -> Iterator[tuple[int, int]]:
        """Row and column of each exemplar."""
        cell = 0
        previous = None
        for exemplar in exemplars:
            if exemplar.category != previous:
                cell = math.ceil(cell / self.group) * self.group
                previous = exemplar.category
            yield divmod(cell, self.columns)
            cell += 1

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """x and y of the pictures of a tile."""
        x = _MARGIN + column * (self.tile_width + _GAP)
        return x, _MARGIN + _HEADER + row * (self.side + _CAPTION + _GAP) + _CAPTION


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib brings it along, with the letters of most languages.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


def _draw_header(draw: ImageDraw.ImageDraw, pool: ExemplarPool, shown: int) -> None:
    origins = Counter(exemplar.mask_from for exemplar in pool.exemplars)
    categories = len({exemplar.category for exemplar in pool.exemplars})
    title = f"{len(pool)} exemplars of {categories} " + (
        "category" if categories == 1 else "categories"
    )
    if shown < len(pool):
        title += f", the first {shown}"
    draw.text((_MARGIN, _MARGIN - 4), title, _INK, _font(16, bold=True))
    x, y = _MARGIN, _MARGIN + 21
    font = _font(12)
    for origin, color in _COLORS.items():
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=color)
        text = f"{origins[origin]} {_EXPLANATIONS[origin]}"
        draw.text((x + 16, y), text, _FADED, font)
        x += 16 + math.ceil(font.getlength(text)) + 18


def _draw_captions(
    draw: ImageDraw.ImageDraw,
    exemplars: Sequence[Exemplar],
    places: Sequence[tuple[int, int]],
    grid: _Grid,
) -> None:
    """The category above the tiles of each that lie side by side, underlined."""
    font = _font(11)
    start = 0
    for index in range(1, len(exemplars) + 1):
        goes_on = (
            index < len(exemplars)
            and exemplars[index].category == exemplars[start].category
            and places[index][0] == places[start][0]
        )
        if goes_on:
            continue
        x0, y = grid.corner(*places[start])
        x1 = grid.corner(*places[index - 1])[0] + grid.tile_width
        # Pillow cannot lay out line breaks, which names of folders may have.
        name = "".join(c if c.isprintable() else "?" for c in exemplars[start].category)
        name = _elided(name, font, x1 - x0)
        draw.text((x0, y - 17), name, _INK, font)
        draw.line((x0, y - 3, x1 - 1, y - 3), fill=_RULE)
        start = index


def _elided(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _on_mat(picture: np.ndarray, side: int) -> Image.Image:
    """A picture in the middle of a square."""
    square = Image.new("RGB", (side, side), _MAT)
    height, width = picture.shape[:2]
    square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    return square


def _shrunk_object(exemplar: Exemplar, side: int) -> np.ndarray:
    """The object on the colour of the mat instead of the gray that networks are to see."""
    mask = exemplar.mask[..., None]
    return shrink(np.where(mask, exemplar.image, np.array(_MAT, dtype=np.uint8)), side)


def _draw_source(exemplar: Exemplar, source: SourceView, side: int) -> Image.Image:
    """The image with the crop's box in white and the mask's outline in the colour of its origin."""
    picture = np.ascontiguousarray(shrink(source.image, side))
    # Of one pixel of the image in the picture, in both directions.
    scale = np.array(picture.shape[1::-1]) / np.array(source.size[::-1])
    x0, y0, x1, y1 = exemplar.box
    first = np.floor(np.array([x0, y0]) * scale).astype(int)
    last = np.ceil(np.array([x1, y1]) * scale).astype(int) - 1
    last = np.minimum(last, np.array(picture.shape[1::-1]) - 1)
    # A white line on a dark one can be seen on any picture.
    cv2.rectangle(picture, first + 1, last - 1, (0, 0, 0), 1)
    cv2.rectangle(picture, first, last, (255, 255, 255), 1)
    crop_to_picture = np.array([x1 - x0, y1 - y0]) / np.array(exemplar.mask.shape[::-1]) * scale
    origin = np.array([x0, y0]) * scale
    # Outside of the image is outside of the mask: so its outline there is drawn, too.
    contours, _ = cv2.findContours(
        exemplar.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    lines = [
        np.round(((c[:, 0] + 0.5) * crop_to_picture + origin - 0.5) * 16).astype(np.int32)
        for c in contours
    ]
    cv2.polylines(picture, lines, True, _COLORS[exemplar.mask_from], 1, cv2.LINE_AA, 4)
    return _on_mat(picture, side)
