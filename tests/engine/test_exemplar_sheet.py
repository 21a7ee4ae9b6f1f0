"""The contact sheet: every exemplar is on it, where its category is, and drawn where it lies."""

from collections import Counter

import numpy as np
import pytest

from unseg.engine.exemplar_sheet import (
    SourceView,
    _elided,
    _font,
    _Grid,
    draw_exemplar_sheet,
    shrink,
)
from unseg.structures import Exemplar, ExemplarPool

GREEN, ORANGE, PINK = (60, 220, 90), (255, 176, 0), (255, 64, 129)


def exemplar(category="a", origin="refined", value=50):
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 15:45] = True
    image = np.full((40, 60, 3), value, dtype=np.uint8)
    return Exemplar(image, mask, category, f"{category}/0.jpg", (30, 20, 150, 100), origin)


def pool_of(*counts):
    return ExemplarPool(
        tuple(exemplar(f"kind {i:03d}") for i, count in enumerate(counts) for _ in range(count))
    )


@pytest.mark.parametrize(
    "counts",
    [[1], [1] * 24, [3] * 24, [9] * 80, [720], [2, 9, 1, 5], [1] * 500, [40, 1, 1]],
    ids=lambda c: f"{len(c)}x{max(c)}",
)
def test_places_are_in_the_sheet_and_in_rows_of_categories(counts):
    pool = pool_of(*counts)
    grid = _Grid.for_exemplars(pool.exemplars, 2)
    places = list(grid.places(pool.exemplars))
    assert len(set(places)) == len(places) == sum(counts)
    assert places == sorted(places)
    assert max(row for row, _ in places) == grid.rows - 1
    assert max(column for _, column in places) < grid.columns
    width, height = grid.size
    x, y = grid.corner(grid.rows - 1, grid.columns - 1)
    assert x + grid.tile_width <= width
    assert y + grid.side <= height
    assert width < 2600
    if max(counts) <= 9:
        rows = Counter()
        for example, (row, _) in zip(pool.exemplars, places, strict=True):
            rows[example.category, row] += 1
        assert sorted(rows.values()) == sorted(counts)  # no category is torn apart


def test_many_categories_of_nine_and_few_of_one():
    nine = _Grid.for_exemplars(pool_of(*[9] * 80).exemplars, 2)
    assert (nine.columns, nine.rows, nine.side) == (9, 80, 64)
    one = _Grid.for_exemplars(pool_of(*[1] * 24).exemplars, 2)
    assert one.columns * one.rows >= 24 > one.columns * (one.rows - 1)
    assert one.side == 96


def near(picture, color, tolerance=40):
    return np.abs(picture.astype(int) - color).max(axis=2) <= tolerance


@pytest.mark.parametrize(
    ("origin", "color"), [("refined", GREEN), ("coarse", ORANGE), ("whole", PINK)]
)
def test_a_tile_shows_where_the_object_lies(origin, color):
    """An image of 240 x 160 as 96 x 64: the crop at (12, 8)-(60, 40), the object inside."""
    view = SourceView(np.full((64, 96, 3), 120, dtype=np.uint8), (160, 240))
    pool = ExemplarPool((exemplar(origin=origin),))
    sheet = draw_exemplar_sheet(pool, [view])
    grid = _Grid.for_exemplars(pool.exemplars, 2)
    x, y = grid.corner(0, 0)
    source = sheet[y + 16 : y + 80, x : x + 96]  # in the middle of its square
    white = near(source, (255, 255, 255), 0)
    expected = np.zeros_like(white)
    expected[8:40, 12:60] = True
    expected[9:39, 13:59] = False
    assert np.array_equal(white, expected)
    ys, xs = np.nonzero(near(source, color))
    # The crop is 60 x 40 in the exemplar and 48 x 32 here, the mask a half and a half of it.
    assert abs(ys.min() - 16) <= 1
    assert abs(ys.max() - 31) <= 1
    assert abs(xs.min() - 24) <= 1
    assert abs(xs.max() - 47) <= 1
    assert (source[24, 36] == 120).all()  # an outline only
    object_view = sheet[y : y + 96, x + 98 : x + 194]
    dark = near(object_view, (50, 50, 50), 0)
    assert dark.sum() == 20 * 30
    assert near(object_view, (236, 237, 240), 0).sum() == 96 * 96 - 600


def test_pools_without_their_images():
    pool = pool_of(2, 1)
    sheet = draw_exemplar_sheet(pool)
    assert near(sheet, (50, 50, 50), 0).sum() >= 3 * 600
    assert near(sheet, (50, 50, 50), 0).sum() < 3 * 600 + 100  # letters


@pytest.mark.parametrize("name", ["two\nlines", "\t", "caf\udce9", "\u65e5\u672c"])
def test_names_of_any_characters(name):
    assert draw_exemplar_sheet(ExemplarPool((exemplar(name),))).any()


def test_long_names_end_in_dots():
    font = _font(11)
    assert _elided("cat", font, 90) == "cat"
    name = _elided("a very long name of some category", font, 90)
    assert name.endswith("…")
    assert font.getlength(name) <= 90 < font.getlength(name[:-1] + "xx…")


def test_shrinking_keeps_proportions_and_small_images():
    assert shrink(np.zeros((300, 600, 3), dtype=np.uint8), 96).shape == (48, 96, 3)
    assert shrink(np.zeros((1, 600, 3), dtype=np.uint8), 96).shape == (1, 96, 3)
    assert shrink(np.zeros((20, 30, 3), dtype=np.uint8), 96).shape == (20, 30, 3)
