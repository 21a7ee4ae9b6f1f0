"""From predictions to instances, against loops over cells, masks and pixels in float64."""

import freesolo_oracle as oracle
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unseg.config import get_cfg
from unseg.modeling.solo import postprocess
from unseg.modeling.solo.postprocess import (
    Candidates,
    SoloInferenceSettings,
    find_candidates,
    mask_boxes,
    masks_in_image,
    point_nms,
    suppress,
    to_instances,
    upsampling_ratio,
)

SETTINGS = SoloInferenceSettings()
FIELDS = (
    "pred_masks",
    "pred_boxes",
    "scores",
    "category_scores",
    "maskness",
    "pred_classes",
    "pred_embeddings",
)


# Point NMS.


@given(
    hnp.arrays(
        np.float64,
        st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(1, 6)] * 2),
        elements=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    )
)
@settings(max_examples=60)
def test_point_nms(scores):
    """With ties: equal neighbours both stay."""
    found = point_nms(torch.from_numpy(scores)).numpy()
    for b in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            assert np.array_equal(found[b, c], oracle.point_nms(scores[b, c]))


def test_point_nms_window_ends_in_the_cell():
    scores = torch.tensor([[[[0.5, 0.6], [0.7, 0.4]]]])
    assert point_nms(scores).tolist() == [[[[0.5, pytest.approx(0.6)], [pytest.approx(0.7), 0.0]]]]


# Candidates.


def random_image(seed, cells=60, classes=2, channels=4, size=(12, 16)):
    """Scores, kernels, embeddings, strides and smooth features of one image."""
    rng = np.random.default_rng(seed)
    scores = rng.random((cells, classes)) * (rng.random((cells, classes)) < 0.5)
    kernels = rng.normal(size=(cells, channels)) * 2
    embeddings = rng.normal(size=(cells, 5))
    strides = rng.choice([8, 32], cells)
    y, x = np.mgrid[: size[0], : size[1]] / max(size) * 6
    features = np.stack([np.sin(x * rng.normal() + y * rng.normal() + k) for k in range(channels)])
    return [torch.from_numpy(v) for v in (scores, kernels, embeddings, strides, features)]


def detect(image, settings):
    scores, kernels, embeddings, strides, features = image
    found = find_candidates(
        scores.float(), kernels.float(), embeddings.float(), strides, features.float(), settings
    )
    return suppress(found, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nms_pre": 7},
        {"max_per_img": 3},
        {"update_thr": 0.3},
        {"score_thr": 0.6},
        {"mask_thr": 0.7},
        {"nms_sigma": 0.5},
        {"nms_kernel": "linear"},
    ],
    ids=str,
)
def test_candidates_and_matrix_nms(changes):
    image = random_image(0)
    changed = SoloInferenceSettings(**changes)
    found = detect(image, changed)
    scores, kernels, embeddings, strides, features = (x.numpy() for x in image)
    names = ("score_thr", "mask_thr", "nms_pre", "update_thr", "max_per_img")
    expected = oracle.detect(
        scores,
        kernels,
        features,
        strides,
        **{name: getattr(changed, name) for name in names},
        kernel=changed.nms_kernel,
        sigma=changed.nms_sigma,
    )
    assert 2 < len(expected) < (scores > 0.1).sum()

    def column(name):
        return np.array([x[name] for x in expected])

    np.testing.assert_allclose(found.scores, column("score"), rtol=1e-5)
    np.testing.assert_allclose(found.category_scores, column("category"), rtol=1e-6)
    np.testing.assert_allclose(found.maskness, column("maskness"), rtol=1e-5)
    np.testing.assert_allclose(found.masks, column("probabilities"), atol=1e-5)
    np.testing.assert_allclose(found.embeddings, embeddings[column("cell")], rtol=1e-6)
    assert found.classes.tolist() == column("class").tolist()
    assert all(x.dtype == torch.float32 for x in (found.scores, found.masks, found.embeddings))


def test_settings_change_the_result():
    """Else the test above would say nothing about them."""
    image = random_image(0)
    before = detect(image, SETTINGS)
    for changes in ({"nms_sigma": 0.5}, {"nms_kernel": "linear"}, {"mask_thr": 0.7}):
        after = detect(image, SoloInferenceSettings(**changes))
        assert len(after.scores) != len(before.scores) or not torch.equal(
            after.scores, before.scores
        )


def one_hot_image(areas, stride, scores, size=(8, 8)):
    """Cell n has a mask of exactly areas[n] pixels, from the first pixel on."""
    features = torch.full((len(areas), size[0] * size[1]), -9.0)
    for feature, area in zip(features, areas, strict=True):
        feature[:area] = 9.0
    n = len(areas)
    return find_candidates(
        torch.tensor(scores)[:, None],
        torch.eye(n),
        torch.randn(n, 3),
        torch.full((n,), stride),
        features.view(n, *size),
        SETTINGS,
    )


def test_masks_have_more_pixels_than_the_stride():
    found = one_hot_image([7, 8, 9, 64, 0], 8, [0.9] * 5)
    assert (found.masks > 0.5).flatten(1).sum(1).tolist() == [9, 64]


def test_scores_are_above_the_threshold():
    found = one_hot_image([20, 30, 40], 8, [0.1, 0.10001, 0.0999])
    assert (found.masks > 0.5).flatten(1).sum(1).tolist() == [30]


def test_masks_of_another_class_do_not_decay_a_score():
    masks = torch.full((3, 4, 4), 0.9)
    found = Candidates(
        masks,
        torch.tensor([0.6, 0.9, 0.8]),
        torch.ones(3),
        torch.ones(3),
        torch.tensor([0, 0, 1]),
        torch.eye(3),
    )
    kept = suppress(found, SETTINGS)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.8, 0.6 * np.exp(-2)])
    assert kept.classes.tolist() == [0, 1, 0]
    assert torch.equal(kept.embeddings, torch.eye(3)[[1, 2, 0]])


# Instances.


def blobs(seed, n, h, w):
    """Smooth probabilities (n, h, w); the last is nowhere above 0.5."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    out = np.zeros((n, h, w))
    for p in out[:-1]:
        for _ in range(2):
            cy, cx, r = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(1, h / 3)
            p += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r * r))
    return out.clip(0, 1)


def candidates(probabilities, dtype=torch.float32):
    n = len(probabilities)
    return Candidates(
        torch.as_tensor(probabilities).to(dtype),
        torch.linspace(0.9, 0.1, n),
        torch.linspace(0.8, 0.3, n),
        torch.linspace(0.7, 0.6, n),
        torch.arange(n) % 2,
        torch.randn(n, 5) * 7,
    )


@pytest.mark.parametrize(
    ("input_size", "output_size"),
    [((32, 48), (32, 48)), ((29, 41), (29, 41)), ((30, 44), (45, 70)), ((32, 45), (9, 13))],
)
@pytest.mark.parametrize("compat", [False, True])
def test_instances_at_the_size_of_the_file(input_size, output_size, compat):
    probabilities = blobs(1, 5, 8, 12)
    found = candidates(probabilities)
    instances = to_instances(
        found, input_size, output_size, 4, SoloInferenceSettings(compat=compat)
    )
    values = [oracle.mask_values_in_file(p, input_size, output_size) for p in probabilities]
    kept = [n for n, v in enumerate(values) if (v > 0.5).any()]
    assert 0 < len(kept) < 5
    assert len(instances) == len(kept)
    assert instances.image_size == output_size
    box = oracle.released_box if compat else oracle.tight_box
    for n, mask, own in zip(
        kept, instances.pred_masks.numpy(), instances.pred_boxes.tensor, strict=True
    ):
        clear = np.abs(values[n] - 0.5) > 1e-5
        assert np.array_equal(mask[clear], (values[n] > 0.5)[clear])
        assert clear.mean() > 0.99
        np.testing.assert_allclose(own, box(mask), atol=1e-4)
    for name, field in (
        ("scores", found.scores),
        ("category_scores", found.category_scores),
        ("maskness", found.maskness),
        ("pred_classes", found.classes),
    ):
        assert torch.equal(instances.get(name), field[kept]), name
    lengths = found.embeddings[kept].norm(dim=1, keepdim=True)
    torch.testing.assert_close(instances.pred_embeddings, found.embeddings[kept] / lengths)


def test_fields():
    instances = to_instances(candidates(blobs(2, 4, 8, 8)), (32, 32), (32, 32), 4, SETTINGS)
    assert tuple(instances.get_fields()) == FIELDS
    assert instances.pred_masks.dtype == torch.bool
    assert isinstance(instances.pred_boxes, Boxes)
    assert instances.pred_classes.dtype == torch.int64
    for name in ("scores", "category_scores", "maskness", "pred_embeddings"):
        assert instances.get(name).dtype == torch.float32
    assert instances.pred_boxes.tensor.dtype == torch.float32


def nothing(h, w):
    return find_candidates(
        torch.zeros(5, 2),
        torch.randn(5, 3),
        torch.randn(5, 4),
        torch.full((5,), 8),
        torch.randn(3, h, w),
        SETTINGS,
    )


@pytest.mark.parametrize("compat", [False, True])
def test_no_candidates(compat):
    settings = SoloInferenceSettings(compat=compat)
    instances = to_instances(suppress(nothing(8, 8), settings), (30, 32), (60, 64), 4, settings)
    assert len(instances) == 0
    assert tuple(instances.get_fields()) == FIELDS
    assert instances.pred_masks.shape == (0, 60, 64)
    assert instances.pred_masks.dtype == torch.bool
    assert instances.pred_boxes.tensor.shape == (0, 4)
    assert instances.pred_embeddings.shape == (0, 4)
    assert instances.scores.shape == (0,)
    assert instances.pred_classes.dtype == torch.int64


def test_all_masks_vanish_in_the_file():
    instances = to_instances(candidates(np.full((3, 8, 8), 0.4)), (30, 32), (60, 64), 4, SETTINGS)
    assert len(instances) == 0
    assert instances.pred_masks.shape == (0, 60, 64)
    assert instances.pred_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("chunk", [1, 2 * 40 * 50, 1 << 24])
def test_chunks_of_masks(monkeypatch, chunk):
    masks = torch.from_numpy(blobs(3, 7, 8, 12)).float()
    expected = masks_in_image(masks, (30, 40), (40, 50), 4, 0.5)
    monkeypatch.setattr(postprocess, "_CHUNK_ELEMENTS", chunk)
    assert torch.equal(masks_in_image(masks, (30, 40), (40, 50), 4, 0.5), expected)


def test_results_stay_on_the_device():
    """Also where nothing is found, where the released code falls back to the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    if device.type == "meta":
        found = mask_boxes(torch.zeros((0, 6, 7), dtype=torch.bool, device=device), False)
        assert found.device == device
        masks = masks_in_image(torch.zeros((0, 6, 7), device=device), (24, 28), (24, 28), 4, 0.5)
        assert masks.device == device
        return
    empty = candidates(np.zeros((0, 8, 8)))
    moved = Candidates(*(getattr(empty, k).to(device) for k in Candidates.__dataclass_fields__))
    instances = to_instances(suppress(moved, SETTINGS), (30, 32), (60, 64), 4, SETTINGS)
    for name in FIELDS:
        assert instances.get(name).device.type == "cuda", name


# Boxes and the quirks of the released code.


def test_boxes_of_a_mask_with_gaps():
    mask = torch.zeros((1, 12, 60), dtype=torch.bool)
    mask[0, 3:7, 10:30] = True
    mask[0, 3:7, 40:44] = True
    assert mask_boxes(mask, compat=False).tolist() == [[10, 3, 44, 7]]
    released = mask_boxes(mask, compat=True)[0].tolist()
    assert released == pytest.approx([11.17, 2.5, 35.17, 6.5], abs=0.005)


@given(hnp.arrays(bool, st.tuples(st.just(1), st.integers(1, 8), st.integers(1, 8))))
@settings(max_examples=60)
def test_boxes_of_any_mask(mask):
    if not mask.any():
        mask[0, -1, -1] = True
    tight = mask_boxes(torch.from_numpy(mask), compat=False)
    assert tight.tolist() == [oracle.tight_box(mask[0])]
    released = mask_boxes(torch.from_numpy(mask), compat=True)[0].tolist()
    assert released == pytest.approx(oracle.released_box(mask[0]), abs=1e-5)


def test_masks_keep_their_place_however_much_is_padded():
    assert upsampling_ratio((8, 8), (9, 13), 4, compat=False) == 4
    masks = torch.zeros(1, 8, 8)
    masks[0, :1, 1:2] = 1.0  # pixels 0..3, 4..7 of a 9 x 13 image
    instances = to_instances(candidates(masks), (9, 13), (9, 13), 4, SETTINGS)
    assert instances.pred_boxes.tensor.tolist() == [[4, 0, 8, 4]]


@pytest.mark.parametrize(
    ("features", "size", "ratio"),
    [((8, 8), (9, 13), 2), ((8, 8), (32, 32), 4), ((8, 16), (20, 64), 4), ((16, 16), (31, 20), 2)],
)
def test_released_upsampling_ratio(features, size, ratio):
    assert upsampling_ratio(features, size, 4, compat=True) == ratio
    masks = torch.from_numpy(blobs(5, 3, *features)).float()
    found = masks_in_image(masks, size, size, ratio, 0.5).numpy()
    for mask, p in zip(found, masks.double().numpy(), strict=True):
        values = oracle.mask_values_in_file(p, size, size, ratio)
        clear = np.abs(values - 0.5) > 1e-5
        assert np.array_equal(mask[clear], (values > 0.5)[clear])


def test_default_thresholds_are_the_papers_and_come_from_the_config():
    assert (SETTINGS.score_thr, SETTINGS.nms_pre, SETTINGS.mask_thr) == (0.1, 500, 0.5)
    assert (SETTINGS.nms_kernel, SETTINGS.nms_sigma) == ("gaussian", 2)
    assert (SETTINGS.update_thr, SETTINGS.max_per_img, SETTINGS.compat) == (0.05, 100, False)
    cfg = get_cfg()
    assert SoloInferenceSettings.from_config(cfg) == SETTINGS
    changes = {
        "score_thr": 0.2,
        "nms_pre": 7,
        "mask_thr": 0.4,
        "nms_kernel": "linear",
        "nms_sigma": 1.0,
        "update_thr": 0.3,
        "max_per_img": 9,
        "compat": True,
    }
    for name, value in changes.items():
        cfg.MODEL.FREESOLO[name.upper()] = value
    assert SoloInferenceSettings.from_config(cfg) == SoloInferenceSettings(**changes)
