"""DeepMaskPatchMapper: planted objects, and everything that images and annotations may be."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import build_mapper, build_test_loader, build_train_loader
from unseg.data.image import ImageReadError
from unseg.data.mappers.deepmask_mapper import cut_patches
from unseg.data.patches import Patch, collect_objects
from unseg.data.sampling import isolated_rng
from unseg.data.square_crop import Square

SIZE = (300, 400)
WIDE = (150, 120, 92, 40)  # XYWH, of the canonical size: the patch's scale is 0


def make_cfg(**changes):
    cfg = get_cfg()
    cfg.INPUT.MAPPER = "DeepMaskPatchMapper"
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.NUM_WORKERS = 0
    for key, value in changes.items():
        prefix = "MODEL.DEEPMASK." if not key.startswith(("INPUT__", "TEST__")) else ""
        cfg.merge_from_list([prefix + key.replace("__", "."), value])
    return cfg


def still(**changes):
    return make_cfg(DATA__JITTER_SHIFT=0.0, DATA__JITTER_SCALE=0.0, **changes)


def rectangle(x, y, w, h, size=SIZE, category=0, crowd=0):
    mask = np.zeros(size, np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return {"segmentation": mask_util.encode(mask), "category_id": category, "iscrowd": crowd}


def triangle(x, y, w, h):
    """Without any symmetry: what is flipped shows."""
    return {"segmentation": [[x, y, x + w, y, x, y + h]], "category_id": 0, "iscrowd": 0}


def decoded(annotation, size=SIZE):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    return mask_util.decode(segmentation).astype(bool)


@pytest.fixture
def make_record(tmp_path):
    """A record of an image that shows its annotations, crowds excepted, white on black."""

    def make(*annotations, size=SIZE, name="a.png", **fields):
        pixels = np.zeros((*size, 3), np.uint8)
        for annotation in annotations:
            if not annotation["iscrowd"]:
                pixels[decoded(annotation, size)] = (255, 240, 225)
        Image.fromarray(pixels).save(tmp_path / name)
        return {
            "file_name": str(tmp_path / name),
            "image_id": 7,
            "height": size[0],
            "width": size[1],
            "annotations": list(annotations),
            **fields,
        }

    return make


def mapped(record, cfg=None, seed=0, is_train=True):
    before = copy.deepcopy(record)
    with isolated_rng(seed):
        result = build_mapper(cfg or make_cfg(), is_train)(record)
    assert record.keys() == before.keys()
    return result


def center_and_extent(mask):
    """Of a mask (g, g): mean x and y with pixels' centres at one half, and the tight box's size."""
    rows, columns = mask.nonzero().T.double()
    center = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    extent = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
    return center, tuple(int(v) for v in extent)


def test_form(make_record):
    result = mapped(make_record(rectangle(*WIDE)))
    assert set(result) == {
        *("file_name", "image_id", "height", "width"),
        *("patches", "patch_masks", "patch_labels"),
    }
    assert result["patches"].dtype == torch.float32
    assert result["patches"].shape == (4, 3, 192, 192)
    assert result["patch_masks"].dtype == result["patch_labels"].dtype == torch.int8
    assert result["patch_masks"].shape == (4, 112, 112)
    positive = result["patch_labels"] == 1
    assert positive.tolist().count(True) == 2
    assert (result["patch_labels"][~positive] == -1).all()
    assert set(result["patch_masks"][positive].unique().tolist()) == {-1, 1}
    assert not result["patch_masks"][~positive].any()
    assert result["patches"].min() > -0.01
    assert result["patches"].max() < 255.01


@pytest.mark.parametrize("context", [0, 32])
@pytest.mark.parametrize(
    "box", [WIDE, (40, 60, 46, 92), (10, 20, 92, 92), (100, 100, 184, 80), (0, 250, 92, 50)]
)
def test_a_planted_object_is_in_its_canonical_place(make_record, box, context):
    """In the middle of image and target, 92 of 160 pixels long: half a stride is 8 and 5.6."""
    result = mapped(make_record(rectangle(*box)), still(CONTEXT=context, GT_SIZE=112))
    window = 160 + context
    factor = 92 / max(box[2:])
    for image, mask, label in zip(*(result[f"patch{k}"] for k in ("es", "_masks", "_labels"))):
        if label < 0:
            continue
        assert image.shape == (3, window, window)
        center, extent = center_and_extent(mask == 1)
        assert center == pytest.approx((56, 56), abs=0.5)
        assert extent == pytest.approx(np.array(box[2:]) * factor * 0.7, abs=1.01)
        white = (image[0] - 127.5) > 1  # grey is no object
        center, extent = center_and_extent(white)
        assert center == pytest.approx((window / 2, window / 2), abs=0.5)
        assert extent == pytest.approx(np.array(box[2:]) * factor, abs=1.01)


def test_the_image_of_the_specifications_example(make_record):
    """Scale 0 and whole corners: the patch is a slice of the image, grey beside it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    record = make_record(rectangle(10, 20, 92, 40))
    Image.fromarray(pixels).save(record["file_name"])
    padded = np.pad(pixels.astype(float), ((56, 0), (40, 0), (0, 0)), constant_values=127.5)
    expected = torch.from_numpy(padded[:192, :192].transpose(2, 0, 1)).float()
    target = np.zeros((160, 160), bool)
    target[60:100, 34:126] = True
    seen = set()
    for seed in range(8):
        result = mapped(record, still(GT_SIZE=160), seed)
        for patch, mask in zip(result["patches"][:2], result["patch_masks"][:2]):
            flip = not torch.equal(patch, expected)
            assert torch.equal(patch.flip(-1) if flip else patch, expected)
            np.testing.assert_array_equal((mask.flip(-1) if flip else mask) == 1, target)
            seen.add(flip)
    assert seen == {True, False}


@pytest.mark.parametrize("seed", range(12))
def test_targets_are_of_what_the_patch_shows(make_record, seed):
    """With jitter and flips, of an object without symmetry; shifted by half a stride it fails."""
    record = make_record(triangle(120, 90, 130, 100))
    result = mapped(record, make_cfg(GT_SIZE=160), seed)
    assert result["patch_labels"].tolist() == [1, 1, -1, -1]
    for patch, mask in zip(result["patches"][:2], result["patch_masks"][:2] == 1):
        seen = patch[0, 16:-16, 16:-16] > 128.5  # more than grey

        def iou(other, mask=mask):
            return float((other & mask).sum() / (other | mask).sum())

        assert iou(seen) > 0.97
        for dx, dy in ((8, 0), (-8, 0), (0, 8), (0, -8)):
            assert iou(seen.roll((dy, dx), (0, 1))) < 0.93
        assert iou(seen.flip(-1)) < 0.75


def test_flips_mirror_image_and_target(make_record):
    record = make_record(triangle(120, 90, 130, 100))
    settings = build_mapper(make_cfg(), True).settings
    objects = collect_objects(record["annotations"], SIZE, settings)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    patches = [Patch(Square(90, 70, 201), target, flip) for target in (0, -1) for flip in (0, 1)]
    result = cut_patches(image, objects, patches, settings)
    assert result["patch_labels"].tolist() == [1, 1, -1, -1]
    for key in ("patches", "patch_masks"):
        assert torch.equal(result[key][0].flip(-1), result[key][1])
        assert torch.equal(result[key][2].flip(-1), result[key][3])
    assert not torch.equal(result["patch_masks"][0], result["patch_masks"][1])


def test_only_the_own_object_is_in_the_target(make_record):
    """Two that touch: the other one is in the image, not in the mask."""
    left, right = rectangle(100, 100, 60, 60), rectangle(160, 100, 60, 60)
    result = mapped(make_record(left, right), still())
    for mask, patch in zip(result["patch_masks"][:2], result["patches"][:2]):
        _, extent = center_and_extent(mask == 1)
        assert extent == pytest.approx((64.4, 64.4), abs=1)
        assert (patch[0, 16:-16, 16:-16] > 250).sum() > 1.3 * 92 * 92


@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [rectangle(0, 0, 200, 200, crowd=1)],
        [rectangle(0, 0, 400, 300, crowd=1)],
        [rectangle(40, 50, 9, 9), rectangle(90, 50, 3, 80)],
        [rectangle(0, 0, 0, 0)],
        [triangle(500, 500, 60, 60)],
    ],
    ids=["nothing", "crowd", "crowd all over", "small", "empty", "outside"],
)
def test_images_without_usable_objects(make_record, annotations):
    result = mapped(make_record(*annotations))
    assert result["patch_labels"].tolist() == [-1] * 4
    assert not result["patch_masks"].any()
    assert result["patches"].shape == (4, 3, 192, 192)
    assert result["patches"].isfinite().all()


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (0, 0, 30, 12), (390, 100, 10, 200)])
def test_objects_at_the_border(make_record, box):
    """The patch leaves the image: grey there, and no mask."""
    result = mapped(make_record(rectangle(*box)), still())
    for patch, mask in zip(result["patches"][:2], result["patch_masks"][:2] == 1):
        assert patch[:, 0, 0].tolist() == [127.5] * 3 or patch[:, 0, -1].tolist() == [127.5] * 3
        _, extent = center_and_extent(mask)
        size = np.array(box[2:]) * 92 / max(box[2:]) * 0.7
        assert extent == pytest.approx(size, abs=3)
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 1), (3, 2)])
def test_tiny_and_thin_images(make_record, size):
    record = make_record(rectangle(0, 0, 500, 700, size=size), size=size)
    cfg = make_cfg(DATA__MIN_AREA=1, DATA__MIN_SIDE=1)
    for seed in range(3):
        result = mapped(record, cfg, seed)
        assert result["patches"].isfinite().all()
        assert (result["patch_labels"] == 1).any()
    assert (mapped(record)["patch_labels"] == -1).all()  # less than 5 pixels wide


def test_channels(make_record):
    record = make_record(rectangle(*WIDE))
    rgb, bgr = mapped(record), mapped(record, make_cfg(INPUT__FORMAT="BGR"))
    assert torch.equal(rgb["patches"].flip(1), bgr["patches"])
    assert not torch.equal(rgb["patches"], bgr["patches"])


def test_a_chosen_annotation_is_in_all_positives(make_record):
    annotations = [rectangle(10, 10, 92, 30), rectangle(150, 100, 30, 92), rectangle(5, 200, 4, 4)]
    record = make_record(*annotations)
    for index, extent in enumerate([(64.4, 21), (21, 64.4)]):
        result = mapped({**record, "annotation_index": index}, still(), seed=index)
        assert "annotation_index" not in result
        assert result["patch_labels"].tolist() == [1, 1, -1, -1]
        for mask in result["patch_masks"][:2]:
            assert center_and_extent(mask == 1)[1] == pytest.approx(extent, abs=1)
    with pytest.raises(ValueError, match=r"a\.png: annotation_index 2 is no usable object"):
        mapped({**record, "annotation_index": 2})


def test_testing_gives_the_image(make_record):
    record = make_record(rectangle(*WIDE))
    pixels = np.asarray(Image.open(record["file_name"])).transpose(2, 0, 1)
    for annotations in (record["annotations"], None):
        record["annotations"] = annotations
        result = mapped(record, is_train=False)
        assert set(result) == {"file_name", "image_id", "height", "width", "image"}
        assert result["image"].dtype == torch.uint8
        np.testing.assert_array_equal(result["image"], pixels)


def test_patches_of_testing_depend_on_the_image_alone(make_record, register):
    cfg = make_cfg(TEST__EVALUATORS=("PatchMaskEvaluator",))
    record = make_record(rectangle(*WIDE), rectangle(20, 20, 100, 60))
    first = mapped(record, cfg, is_train=False)
    assert first["image"].shape == (3, *SIZE)
    assert first["patch_labels"].tolist() == [1, 1, -1, -1]
    second = mapped(record, cfg, seed=1, is_train=False)
    assert all(torch.equal(first[k], second[k]) for k in first if k.startswith("patch"))
    for other in (8, "7b"):
        third = mapped({**record, "image_id": other}, cfg, is_train=False)
        assert not torch.equal(first["patches"], third["patches"])
    name = register([record])
    (batch,) = build_test_loader(cfg, name)
    assert torch.equal(batch[0]["patches"], first["patches"])
    del record["annotations"]
    alone = mapped(record, cfg, is_train=False)
    assert set(alone) == {"file_name", "image_id", "height", "width", "image"}
    assert torch.equal(alone["image"], first["image"])
    with pytest.raises(ValueError, match=r"a\.png: .*needs 'annotations'"):
        mapped(record, cfg)


@pytest.fixture
def two_categories(make_record, register):
    """A cat of the canonical size and a dog of half of it."""
    cat, dog = rectangle(*WIDE, category=0), rectangle(20, 20, 46, 40, category=1)
    record = make_record(cat, dog)
    return record, register([record], thing_classes=["cat", "dog", "eel"])


def subset_cfg(name, *names, **changes):
    cfg = make_cfg(DATA__CATEGORY_SUBSET=names, **changes)
    cfg.DATASETS.TRAIN = (name,)
    return cfg


def test_only_some_categories(two_categories):
    record, name = two_categories
    for names, expected in [(("cat",), {0}), (("dog",), {1}), (("dog", "cat"), {0, 1})]:
        mapper = build_mapper(subset_cfg(name, *names), True)
        objects = collect_objects(record["annotations"], SIZE, mapper.settings, mapper.categories)
        assert set(objects.numbers.tolist()) == expected
    # The cat is 64 of 112 pixels long; so is the dog, but it is higher.
    for names, height in [(("cat",), 28), (("dog",), 56)]:
        cfg = subset_cfg(name, *names, DATA__JITTER_SHIFT=0.0, DATA__JITTER_SCALE=0.0)
        for seed in range(5):
            result = mapped(record, cfg, seed)
            for mask in result["patch_masks"][:2]:
                assert center_and_extent(mask == 1)[1][1] == pytest.approx(height, abs=1)
    result = mapped(record, subset_cfg(name, "eel"))
    assert result["patch_labels"].tolist() == [-1] * 4


def test_negatives_may_lie_on_other_categories(two_categories):
    record, name = two_categories

    def nearest(*names):
        cfg = subset_cfg(name, *names, DATA__PATCHES_PER_IMAGE=40)
        cfg.MODEL.DEEPMASK.TEST.SCALES = (0.0,)
        mapper = build_mapper(cfg, True)
        closest = []
        for seed in range(5):
            with isolated_rng(seed):
                result = mapper(record)
            negative = result["patches"][result["patch_labels"] == -1]
            # White pixels in the middle of a patch: it is centred on an object.
            closest.append(int((negative[:, 0, 92:100, 92:100] > 250).all((1, 2)).sum()))
        return sum(closest)

    assert nearest("eel") > nearest("cat", "dog")


def test_testing_is_on_all_categories(two_categories):
    record, name = two_categories
    cfg = subset_cfg(name, "eel", TEST__EVALUATORS=("PatchMaskEvaluator",))
    assert mapped(record, cfg, is_train=False)["patch_labels"].tolist() == [1, 1, -1, -1]


def test_unknown_categories_list_the_known(two_categories, register, make_record):
    _, name = two_categories
    with pytest.raises(ValueError, match=r"CATEGORY_SUBSET: toy has no \['cow'\].*'cat', 'dog'"):
        build_mapper(subset_cfg(name, "cat", "cow"), True)
    build_mapper(subset_cfg(name, "cow"), False)  # not read
    other = register([], name="toy2", thing_classes=["dog", "cat"])
    cfg = subset_cfg(name, "dog")
    cfg.DATASETS.TRAIN = (name, other)
    with pytest.raises(ValueError, match="number their categories differently: toy, toy2"):
        build_mapper(cfg, True)


def test_categories_that_are_known_after_loading(register, make_record):
    def load():
        MetadataCatalog.get("late").thing_classes = ["cat", "dog"]
        return []

    register(load, name="late")
    assert build_mapper(subset_cfg("late", "dog"), True).categories == {1}
    register(lambda: [], name="none")
    with pytest.raises(ValueError, match=r"none has no \['dog'\]; it has \[\]"):
        build_mapper(subset_cfg("none", "dog"), True)
    assert DatasetCatalog.get("none") == []


def test_errors_name_the_file_or_the_key(make_record, tmp_path):
    record = make_record(rectangle(*WIDE))
    with pytest.raises(ImageReadError, match=r"missing\.png"):
        mapped({**record, "file_name": str(tmp_path / "missing.png")})
    with pytest.raises(SizeMismatchError):
        mapped({**record, "width": 399})
    boxes = [{"bbox": [0, 0, 50, 50], "bbox_mode": 1, "category_id": 0}]
    with pytest.raises(ValueError, match=r"a\.png: annotation 0 has no segmentation"):
        mapped({**record, "annotations": boxes})
    with pytest.raises(ValueError, match=r"MODEL\.DEEPMASK\.DATA\.SAMPLING .* 'category'"):
        build_mapper(make_cfg(DATA__SAMPLING="category"), True)


def samples(record_name, workers, seed=4):
    cfg = make_cfg(DATA__PATCHES_PER_IMAGE=2, INPUT_SIZE=32, CONTEXT=16, GT_SIZE=24)
    cfg.DATASETS.TRAIN = (record_name,)
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = seed
    batches = iter(build_train_loader(cfg))
    return [sample for _ in range(4) for sample in next(batches)]


def test_workers_do_not_change_the_patches(make_record, register):
    records = [
        make_record(rectangle(*WIDE), triangle(10, 10, 60, 80), name="a.png", image_id=1),
        make_record(name="b.png", image_id=2),
        make_record(triangle(200, 100, 90, 90), name="c.png", image_id=3),
    ]
    name = register(records)
    one, two = samples(name, 0), samples(name, 2)
    assert [s["image_id"] for s in one] == [s["image_id"] for s in two]
    for key in ("patches", "patch_masks", "patch_labels"):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(one, two))
    # Every draw is another one, and so is every seed.
    same = [s["patches"] for s in one if s["image_id"] == 1]
    assert len(same) > 1
    assert not torch.equal(same[0], same[1])
    assert any(
        not torch.equal(a["patches"], b["patches"]) for a, b in zip(one, samples(name, 0, 5))
    )
