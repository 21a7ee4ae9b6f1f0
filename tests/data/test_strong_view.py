"""The strong view, step by step, against colorsys, torchvision and slow loops."""

import colorsys
import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.transforms import v2

from unseg.config import get_cfg
from unseg.data.mappers import StrongViewSettings, strong_view
from unseg.data.mappers.strong_view import blur, rotate_hue

NOTHING = StrongViewSettings(
    color_jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, erasing=((0.0, 0.1, 0.2, 1.0, 1.0),)
)
EVERYTHING = StrongViewSettings(
    color_jitter_prob=1.0, blur_prob=1.0, erasing=((1.0, 0.1, 0.3, 0.3, 3.0),) * 2
)


def only(**changes):
    return dataclasses.replace(NOTHING, **changes)


def random_image(seed, height=24, width=32):
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def view(image, settings, seed, **kwargs):
    torch.manual_seed(seed)
    return strong_view(image, settings, **kwargs)


def difference(a, b):
    return int((a.int() - b.int()).abs().max())


sides = st.integers(1, 5)
images = hnp.arrays(np.uint8, st.tuples(st.just(3), sides, sides), elements=st.integers(0, 255))


def test_defaults_are_those_of_the_config():
    from_config = StrongViewSettings.from_config(get_cfg())
    assert from_config == StrongViewSettings()
    cfg = get_cfg()
    cfg.MODEL.FREESOLO.DATA.BLUR_PROB = 0.25
    cfg.MODEL.FREESOLO.DATA.ERASING = ((0.5, 0.1, 0.2, 1.0, 2.0),)
    assert StrongViewSettings.from_config(cfg) == StrongViewSettings(
        blur_prob=0.25, erasing=((0.5, 0.1, 0.2, 1.0, 2.0),)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("COLOR_JITTER", (0.4, 0.4, 0.4)),
        ("COLOR_JITTER", (0.4, 0.4, 0.4, 0.6)),
        ("COLOR_JITTER", (0.4, -0.1, 0.4, 0.1)),
        ("COLOR_JITTER_PROB", 1.5),
        ("GRAYSCALE_PROB", -0.1),
        ("BLUR_PROB", 2.0),
        ("BLUR_SIGMA", (0.0, 1.0)),
        ("BLUR_SIGMA", (2.0, 1.0)),
        ("ERASING", ((1.1, 0.1, 0.2, 1.0, 2.0),)),
        ("ERASING", ((0.1, 0.1, 0.2, 1.0),)),
        ("ERASING", ((0.1, 0.3, 0.2, 1.0, 2.0),)),
        ("ERASING", ((0.1, 0.1, 1.2, 1.0, 2.0),)),
        ("ERASING", ((0.1, 0.1, 0.2, 0.0, 2.0),)),
    ],
)
def test_bad_settings_name_their_key(key, value):
    cfg = get_cfg()
    cfg.MODEL.FREESOLO.DATA[key] = value
    with pytest.raises(ValueError, match=rf"MODEL\.FREESOLO\.DATA\.{key}: "):
        StrongViewSettings.from_config(cfg)


def test_probability_0_changes_nothing_and_does_no_work(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("work for nothing")

    for name in ("GaussianBlur", "cvtColor"):
        monkeypatch.setattr(cv2, name, fail)
    for name in ("ColorJitter", "RandomErasing"):
        monkeypatch.setattr(v2, name, fail)
    image = random_image(0)
    for seed in range(50):
        result = view(image, NOTHING, seed)
        assert torch.equal(result, image)
        assert result.data_ptr() != image.data_ptr()


@given(images, st.floats(-0.5, 0.5))
def test_hue_against_colorsys(pixels, turn):
    turned = rotate_hue(torch.from_numpy(pixels), turn).numpy()
    for y, x in np.ndindex(pixels.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255.0))
        expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)) * 255
        assert np.abs(turned[:, y, x] - expected).max() < 1.01


def mirrored(index, n):
    """Position in 0..n-1 that a position beyond the border stands for: ... 2 1 0 1 2 ..."""
    while not 0 <= index < n:
        index = 0 if n == 1 else (-index if index < 0 else 2 * (n - 1) - index)
    return index


def slow_blur(plane, sigma):
    radius = math.ceil(6 * sigma)
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (0, 1):
        moved = np.moveaxis(plane, axis, 0).astype(np.float64)
        n = len(moved)
        plane = np.moveaxis(
            np.stack([
                sum(w * moved[mirrored(i + k - radius, n)] for k, w in enumerate(weights))
                for i in range(n)
            ]), 0, axis,
        )  # fmt: skip
    return plane


@settings(max_examples=25)
@given(images, st.floats(0.1, 2.5))
def test_blur_against_loops(pixels, sigma):
    blurred = blur(torch.from_numpy(pixels), sigma)
    assert blurred.shape == pixels.shape
    for plane, result in zip(pixels, blurred.numpy()):
        assert np.abs(result - slow_blur(plane, sigma)).max() < 0.6


def test_blur_sigma_stays_in_its_range():
    image = torch.zeros(3, 15, 15, dtype=torch.uint8)
    image[:, 7, 7] = 255
    spread = []
    for seed in range(60):
        peak = view(image, only(blur_prob=1.0, blur_sigma=(0.5, 2.0)), seed)[0, 7, 7]
        spread.append(int(peak))
    sharp, soft = (int(blur(image, sigma)[0, 7, 7]) for sigma in (0.5, 2.0))
    assert soft <= min(spread) < soft + 5
    assert sharp >= max(spread) > sharp - 40


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.0), (0.4, 0.4, 0.4, 0.1), (0, 0, 0, 0.5)])
def test_jitter_is_torchvisions(seed, strengths):
    image = random_image(seed)
    ours = view(image, only(color_jitter_prob=1.0, color_jitter=strengths), seed)
    torch.manual_seed(seed)
    torch.rand(())  # whether to jitter
    theirs = v2.ColorJitter(*strengths)(image)
    assert not torch.equal(ours, image)
    # Our hue is within one level of theirs; contrast and saturation may magnify that.
    assert difference(ours, theirs) <= (3 if strengths[3] else 0)


def test_grayscale():
    image = random_image(1)
    gray = view(image, only(grayscale_prob=1.0), 0)
    luma = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(np.float64), 1)
    assert np.abs(gray.numpy() - luma).max() < 1.1  # torchvision rounds down
    assert gray.is_contiguous()


def test_erased_rectangles_are_noise_within_their_ranges():
    height, width = 60, 80
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    values = [set(), set(), set()]
    shapes = set()
    for seed in range(40):
        erased = view(image, only(erasing=((1.0, 0.05, 0.2, 0.3, 3.3),)), seed)
        rows, columns = np.nonzero((erased != 7).any(0).numpy())
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        h, w = bottom - top, right - left
        shapes.add((h, w))
        # Within the ranges, up to the rounding of both sides.
        assert (h - 0.5) * (w - 0.5) <= 0.2 * height * width
        assert (h + 0.5) * (w + 0.5) >= 0.05 * height * width
        assert (h - 0.5) / (w + 0.5) <= 3.3
        assert (h + 0.5) / (w - 0.5) >= 0.3
        inside = erased[:, top:bottom, left:right]
        assert (inside != 7).float().mean() > 0.95
        for seen, channel in zip(values, inside):
            seen.update(channel.flatten().tolist())
    assert values == [set(range(256))] * 3
    assert len(shapes) > 20


def test_every_rectangle_of_the_list_is_drawn():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    small = (1.0, 0.04, 0.04, 1.0, 1.0)
    for seed in range(10):
        counts = [
            int((view(image, only(erasing=(small,) * n), seed) != 0).any(0).sum()) for n in (1, 3)
        ]
        assert 55 <= counts[0] <= 64
        assert 64 < counts[1] <= 192


def test_rectangles_that_do_not_fit_are_left_out():
    image = random_image(0, 10, 10)
    assert torch.equal(view(image, only(erasing=((1.0, 1.0, 1.0, 1.0, 1.0),)), 0), image)


@pytest.mark.parametrize("step", ["color_jitter_prob", "grayscale_prob", "blur_prob", "erasing"])
def test_probabilities(step):
    value = ((0.3, 0.2, 0.2, 1.0, 1.0),) if step == "erasing" else 0.3
    image = random_image(3, 8, 8)
    changed = sum(not torch.equal(view(image, only(**{step: value}), s), image) for s in range(400))
    assert 80 <= changed <= 160  # four standard deviations


def test_bgr_is_augmented_as_rgb():
    image = random_image(4)
    for seed in range(20):
        rgb = view(image, EVERYTHING, seed)
        bgr = view(image.flip(0), EVERYTHING, seed, image_format="BGR")
        assert torch.equal(bgr.flip(0), rgb)
    # Gray depends on which channel is which.
    assert not torch.equal(
        view(image, only(grayscale_prob=1.0), 0),
        view(image, only(grayscale_prob=1.0), 0, image_format="BGR"),
    )


def test_the_seed_decides_and_the_image_stays():
    image = random_image(5)
    before = image.clone()
    first, again, other = (view(image, EVERYTHING, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(image, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 40), (40, 1), (2, 2), (3, 5)])
def test_tiny_images(size):
    image = random_image(6, *size)
    results = [view(image, EVERYTHING, seed) for seed in range(30)]
    assert all(r.shape == image.shape and r.dtype == torch.uint8 for r in results)
    assert any(not torch.equal(r, image) for r in results)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 4, 4),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"\(3, H, W\) uint8"):
        strong_view(image, NOTHING)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="RGB or BGR"):
        strong_view(random_image(0), NOTHING, "L")
