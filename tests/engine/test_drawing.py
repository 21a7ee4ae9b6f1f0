"""Pictures: masks are filled where they are, all of them visible."""

import numpy as np

from unseg.engine.drawing import draw_instances, side_by_side


def test_masks_are_filled_and_the_rest_is_left():
    image = np.full((61, 83, 3), 100, dtype=np.uint8)
    masks = np.zeros((2, 61, 83), dtype=bool)
    masks[0, 5:50, 10:70] = True
    masks[1, 20:30, 30:40] = True  # inside the first: must not be hidden
    drawn = draw_instances(image, masks)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    changed = (drawn != image).any(2)
    assert changed[masks.any(0)].all()
    far = ~masks.any(0)
    far[3:52, 8:72] = False
    assert not changed[far].any()
    inner, outer = drawn[25, 35].astype(int), drawn[10, 15].astype(int)
    assert np.abs(inner - outer).max() > 30


def test_nothing_to_draw():
    image = np.zeros((5, 6, 3), dtype=np.uint8)
    assert np.array_equal(draw_instances(image, np.zeros((0, 5, 6), dtype=bool)), image)


def test_small_masks_are_drawn():
    """Detectron2 main leaves out masks of fewer than ten pixels in some of its functions."""
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    masks = np.zeros((1, 40, 40), dtype=bool)
    masks[0, 20:22, 20:23] = True
    assert (draw_instances(image, masks)[20:22, 20:23] > 0).any()


def test_side_by_side():
    a, b = np.zeros((4, 3, 3), np.uint8), np.full((6, 2, 3), 9, np.uint8)
    row = side_by_side([a, b])
    assert row.shape == (6, 3 + 4 + 2, 3)
    assert (row[:4, :3] == 0).all()
    assert (row[4:, :3] == 255).all()
    assert (row[:, -2:] == 9).all()
