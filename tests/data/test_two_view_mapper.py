"""The two-view mapper against InstanceMapper and loops."""

import copy

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import build_mapper
from unseg.data.sampling import DrawDataset, isolated_rng

SIZE = (40, 60)
RECTANGLES = [(5, 15, 10, 30), (0, 40, 0, 60), (20, 39, 40, 49), (30, 38, 2, 9), (0, 6, 50, 60)]


def rle(y0, y1, x0, x1):
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return mask_util.encode(mask)


@pytest.fixture
def record(tmp_path):
    """Objects k = 0, 2, 3, 4 of category k with an embedding full of k; 1 is a crowd."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "height": SIZE[0],
        "width": SIZE[1],
        "annotations": [
            {
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": k,
                "iscrowd": int(k == 1),
                "segmentation": rle(y0, y1, x0, x1),
                "embedding": np.full(16, k, np.float32),
            }
            for k, (y0, y1, x0, x1) in enumerate(RECTANGLES)
        ],
    }


def make_cfg(**changes):
    cfg = get_cfg()
    cfg.INPUT.MAPPER = "TwoViewInstanceMapper"
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (30, 50, 80)
    cfg.MODEL.FREESOLO.EMB_DIM = 8
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def unchanged_view(**changes):
    """No geometric augmentation."""
    return make_cfg(INPUT__MIN_SIZE_TRAIN=(SIZE[0],), INPUT__RANDOM_FLIP="none", **changes)


def mapped(cfg, record, seed=0, is_train=True):
    with isolated_rng(seed):
        return build_mapper(cfg, is_train)(record)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_weak_view_is_that_of_the_instance_mapper(record, seed, crop):
    before = copy.deepcopy(record)
    ours = mapped(make_cfg(INPUT__CROP__ENABLED=crop), record, seed)
    np.testing.assert_equal(record, before)
    theirs = mapped(
        make_cfg(INPUT__CROP__ENABLED=crop, INPUT__MAPPER="InstanceMapper"), record, seed
    )
    assert set(ours) - set(theirs) == {"strong_image"}
    assert torch.equal(ours["image"], theirs["image"])
    ours, theirs = ours["instances"], theirs["instances"]
    assert set(ours.get_fields()) - set(theirs.get_fields()) == {"gt_embeddings"}
    assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)
    assert torch.equal(ours.gt_classes, theirs.gt_classes)


def test_strong_view_differs_from_the_weak_one_by_colours_alone(record):
    cfg = make_cfg()
    data = cfg.MODEL.FREESOLO.DATA
    data.ERASING, data.COLOR_JITTER_PROB, data.BLUR_PROB, data.GRAYSCALE_PROB = (), 0.0, 0.0, 1.0
    shapes, flipped = set(), set()
    original = np.asarray(Image.open(record["file_name"])).transpose(2, 0, 1)
    for seed in range(12):
        result = mapped(cfg, record, seed)
        weak, strong = result["image"].numpy().astype(np.float64), result["strong_image"]
        assert strong.dtype == torch.uint8
        gray = np.tensordot([0.299, 0.587, 0.114], weak, 1)
        assert strong.shape == weak.shape
        assert np.abs(strong.numpy() - gray).max() < 1.1
        shapes.add(tuple(strong.shape))
        left = original[:, :, :20].mean() < original[:, :, -20:].mean()
        flipped.add(left == (weak[:, :, :20].mean() < weak[:, :, -20:].mean()))
    assert len(shapes) == 3
    assert flipped == {True, False}


def test_strong_view_is_augmented_from_the_config(record):
    result = mapped(make_cfg(), record)
    assert not torch.equal(result["strong_image"], result["image"])
    assert "strong_image" not in mapped(make_cfg(MODEL__FREESOLO__DATA__STRONG_VIEW=False), record)


def test_bgr(record):
    for seed in range(5):
        rgb = mapped(make_cfg(), record, seed)
        bgr = mapped(make_cfg(INPUT__FORMAT="BGR"), record, seed)
        assert torch.equal(bgr["image"], rgb["image"].flip(0))
        assert torch.equal(bgr["strong_image"], rgb["strong_image"].flip(0))


def test_testing_is_the_instance_mappers(record):
    ours = mapped(make_cfg(), record, is_train=False)
    theirs = mapped(make_cfg(INPUT__MAPPER="InstanceMapper"), record, is_train=False)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])


@pytest.mark.parametrize("boxes", ["masks", "xyxy_as_xywh"])
def test_embeddings_stay_with_their_objects(record, boxes):
    cfg = make_cfg(INPUT__CROP__ENABLED=True, MODEL__FREESOLO__DATA__BOXES=boxes)
    cfg.INPUT.CROP.SIZE = (0.4, 0.4)
    numbers = set()
    for seed in range(30):
        objects = mapped(cfg, record, seed)["instances"]
        numbers.add(len(objects))
        assert objects.gt_embeddings.dtype == torch.float32
        assert torch.equal(objects.gt_embeddings, objects.gt_classes[:, None].float().expand(-1, 8))
        assert objects.gt_masks.tensor.flatten(1).any(1).all()
    assert len(numbers) >= 3, "the crop drops objects"


def slow_resize(vector, length):
    resized = []
    for i in range(length):
        position = min(max((i + 0.5) * len(vector) / length - 0.5, 0), len(vector) - 1)
        low = int(position)
        high = min(low + 1, len(vector) - 1)
        resized.append(vector[low] + (position - low) * (vector[high] - vector[low]))
    return np.array(resized)


@pytest.mark.parametrize("length", [1, 3, 8, 13, 128])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_embeddings_of_any_length(record, length, dtype):
    vectors = [np.random.default_rng(k).normal(size=length).astype(dtype) for k in range(5)]
    for annotation, vector in zip(record["annotations"], vectors):
        annotation["embedding"] = vector
    found = mapped(unchanged_view(), record)["instances"].gt_embeddings
    assert found.dtype == torch.float32
    expected = [slow_resize(vectors[k].astype(np.float64), 8) for k in (0, 2, 3, 4)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    if length == 8:
        assert np.array_equal(found.numpy(), np.float32(vectors)[[0, 2, 3, 4]])


def test_embeddings_of_the_backbone_as_free_mask_stores_them(record):
    query = np.random.default_rng(0).normal(size=2048).astype(np.float32)
    record["annotations"][0]["embedding"] = query
    cfg = unchanged_view(MODEL__FREESOLO__EMB_DIM=128)
    i = np.arange(128)
    expected = (query[16 * i + 7] + query[16 * i + 8]) / 2
    found = mapped(cfg, record)["instances"].gt_embeddings
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_objects_without_embedding_have_a_row_of_zeros(record):
    del record["annotations"][2]["embedding"]
    record["annotations"][3]["embedding"] = None
    record["annotations"][4]["embedding"] = [1.0, 1.0]
    found = mapped(unchanged_view(), record)["instances"].gt_embeddings
    assert found.tolist() == [[0.0] * 8, [0.0] * 8, [0.0] * 8, [1.0] * 8]
    for annotation in record["annotations"]:
        annotation.pop("embedding", None)
    found = mapped(unchanged_view(), record)["instances"].gt_embeddings
    assert found.tolist() == [[0.0] * 8] * 4


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ([1.0, np.nan], "not finite"),
        ([np.inf, 0.0], "not finite"),
        (np.array([1e300]), "not finite"),
        ([], r"shape \(0,\)"),
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
        (3.0, r"shape \(\)"),
    ],
)
def test_bad_embeddings_name_the_file(record, embedding, message):
    record["annotations"][3]["embedding"] = embedding
    with pytest.raises(ValueError, match=rf"a\.png: an embedding has .*{message}"):
        mapped(make_cfg(), record)


def test_boxes_misread_as_in_the_released_code(record):
    cfg = unchanged_view(MODEL__FREESOLO__DATA__BOXES="xyxy_as_xywh")
    # Stored boxes count for nothing: the released code's are those of the masks.
    record["annotations"][0]["bbox"] = [0, 0, 1, 1]
    found = mapped(cfg, record)["instances"].gt_boxes.tensor
    expected = [
        [x0, y0, min(x0 + x1, SIZE[1]), min(y0 + y1, SIZE[0])]
        for k, (y0, y1, x0, x1) in enumerate(RECTANGLES)
        if k != 1
    ]
    assert found.tolist() == expected
    y0, y1, x0, x1 = RECTANGLES[0]
    corners = [x0, y0, x1, y0, x1, y1, x0, y1]
    record["annotations"][0]["segmentation"] = [corners]
    assert mapped(cfg, record)["instances"].gt_boxes.tensor.tolist() == expected


def test_misread_boxes_follow_the_image(record):
    y0, y1, x0, x1 = RECTANGLES[3]  # neither side reaches the border
    cfg = make_cfg(MODEL__FREESOLO__DATA__BOXES="xyxy_as_xywh", INPUT__MIN_SIZE_TRAIN=(80,))
    seen = set()
    for seed in range(10):
        objects = mapped(cfg, record, seed)["instances"]
        box = objects.gt_boxes.tensor[objects.gt_classes == 3].tolist()
        straight = [[2 * x0, 2 * y0, 2 * (x0 + x1), 80]]
        mirrored = [[120 - 2 * (x0 + x1), 2 * y0, 120 - 2 * x0, 80]]
        assert box in (straight, mirrored)
        seen.add(box == straight)
    assert seen == {True, False}


def test_misread_boxes_contain_the_masks(record):
    cfg = make_cfg(MODEL__FREESOLO__DATA__BOXES="xyxy_as_xywh", INPUT__CROP__ENABLED=True)
    for seed in range(10):
        objects = mapped(cfg, record, seed)["instances"]
        tight, wrong = objects.gt_masks.get_bounding_boxes().tensor, objects.gt_boxes.tensor
        # Masks are resized to whole pixels, boxes are not.
        assert (wrong[:, :2] <= tight[:, :2] + 1).all()
        assert (wrong[:, 2:] >= tight[:, 2:] - 1).all()


def test_unknown_boxes_name_the_key(record):
    with pytest.raises(ValueError, match=r"MODEL\.FREESOLO\.DATA\.BOXES .*'tight'"):
        build_mapper(make_cfg(MODEL__FREESOLO__DATA__BOXES="tight"), True)


@pytest.mark.parametrize("boxes", ["masks", "xyxy_as_xywh"])
@pytest.mark.parametrize("annotations", ["none", "crowd", "no key"])
def test_images_without_objects(record, boxes, annotations):
    if annotations == "no key":
        del record["annotations"]
    else:
        record["annotations"] = record["annotations"][1:2] if annotations == "crowd" else []
    result = mapped(make_cfg(MODEL__FREESOLO__DATA__BOXES=boxes), record)
    objects = result["instances"]
    assert objects.gt_embeddings.shape == (0, 8)
    assert objects.gt_embeddings.dtype == torch.float32
    assert objects.gt_boxes.tensor.shape == (0, 4)
    assert objects.gt_masks.tensor.shape == (0, *result["image"].shape[1:])
    assert result["strong_image"].shape == result["image"].shape


def test_annotations_without_masks(record):
    for annotation in record["annotations"]:
        del annotation["segmentation"]
    with pytest.raises(ValueError, match=r"a\.png: its annotations have no 'segmentation'"):
        mapped(make_cfg(), record)
    objects = mapped(unchanged_view(MODEL__MASK_ON=False), record)["instances"]
    assert objects.gt_boxes.tensor[0].tolist() == [10, 5, 30, 15]
    assert objects.gt_embeddings[:, 0].tolist() == [0, 2, 3, 4]
    cfg = unchanged_view(MODEL__MASK_ON=False, MODEL__FREESOLO__DATA__BOXES="xyxy_as_xywh")
    assert mapped(cfg, record)["instances"].gt_boxes.tensor[0].tolist() == [10, 5, 40, 20]


def test_the_draw_number_decides(record):
    dataset = DrawDataset([record], build_mapper(make_cfg(), True), seed=3)
    torch.manual_seed(0)
    first = dataset[0, 11]
    torch.manual_seed(1)
    again, other = dataset[0, 11], dataset[0, 12]
    assert torch.equal(first["strong_image"], again["strong_image"])
    assert first["strong_image"].shape != other["strong_image"].shape or not torch.equal(
        first["strong_image"], other["strong_image"]
    )
