"""The pseudo-mask file: written whole, read back exactly, refused with the record's name."""

import copy
import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from unseg.discovery import PseudoMaskError, io, load_pseudo_masks, write_pseudo_masks
from unseg.discovery.statistics import MaskStatistics, mask_statistics
from unseg.structures import ImageRecord, PseudoMask


def rle_of(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def random_records(rng, images=4, embedding_dim=None):
    records = []
    for i in range(images):
        h, w = rng.integers(3, 40, 2).tolist()
        masks = []
        for _ in range(int(rng.integers(0, 4))):
            pixels = rng.random((h, w)) < 0.3
            pixels[rng.integers(h), rng.integers(w)] = True
            vector = None if embedding_dim is None else rng.normal(size=embedding_dim)
            masks.append(PseudoMask(rle_of(pixels), float(rng.random()), vector))
        records.append(ImageRecord(f"folder/{i}.jpg", h, w, 10 * i + 3, masks))
    return records


@pytest.mark.parametrize("embedding_dim", [None, 5])
@pytest.mark.parametrize("seed", range(4))
def test_round_trip(tmp_path, seed, embedding_dim):
    records = random_records(np.random.default_rng(seed), embedding_dim=embedding_dim)
    path = tmp_path / "masks.json"
    write_pseudo_masks(path, records, info={"origin": "test"})
    read = load_pseudo_masks(path)
    assert read == records
    for old, new in zip(records, read, strict=True):
        for a, b in zip(old.masks, new.masks, strict=True):
            assert np.array_equal(a.decode(), b.decode())
            if embedding_dim is None:
                assert b.embedding is None
            else:
                np.testing.assert_array_equal(b.embedding, a.embedding.astype(np.float16))


def test_the_header_says_what_is_in_the_file(tmp_path):
    records = random_records(np.random.default_rng(0), embedding_dim=3)
    statistics = MaskStatistics(dropped=Counter({"empty": 3}))
    write_pseudo_masks(tmp_path / "x.json", iter(records), statistics=statistics)
    found = io.read_header(tmp_path / "x.json")["statistics"]
    assert found == mask_statistics(records, {"empty": 3}).to_json()
    assert load_pseudo_masks(tmp_path / "x.json") == records
    write_pseudo_masks(tmp_path / "y.json", records)
    assert "statistics" not in io.read_header(tmp_path / "y.json")


def test_file_is_valid_coco(tmp_path):
    records = random_records(np.random.default_rng(0))
    path = tmp_path / "masks.json"
    write_pseudo_masks(path, records)
    coco = COCO(str(path))
    assert sorted(coco.getImgIds()) == sorted(r.image_id for r in records)
    assert sorted(coco.getAnnIds()) == list(range(1, sum(len(r.masks) for r in records) + 1))
    assert coco.loadCats(coco.getCatIds()) == [io.CATEGORY]
    for annotation in coco.loadAnns(coco.getAnnIds()):
        pixels = coco.annToMask(annotation)
        ys, xs = np.nonzero(pixels)
        assert annotation["area"] == pixels.sum()
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert annotation["bbox"] == box


def test_equal_records_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        records = random_records(np.random.default_rng(5), embedding_dim=3)
        write_pseudo_masks(tmp_path / name / "x.json", iter(records))
    files = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("a", "b")]
    assert files[0] == files[1]
    assert len(files[0]) == 2
    for name in files[0]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "masks.json"
    write_pseudo_masks(path, random_records(np.random.default_rng(0), embedding_dim=3))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    record = random_records(np.random.default_rng(1))[0]
    with pytest.raises(ValueError, match="several images"):
        write_pseudo_masks(path, [record, record])

    def dying():
        yield record
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pseudo_masks(path, dying())
    with pytest.raises(ValueError, match="not JSON compliant"):
        bad = PseudoMask(rle_of(np.ones((3, 3))), float("nan"))
        write_pseudo_masks(path, [ImageRecord("a.jpg", 3, 3, 1, [bad])])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_overwriting_removes_the_old_sidecar(tmp_path):
    path = tmp_path / "masks.json"
    for seed in (0, 1):
        write_pseudo_masks(path, random_records(np.random.default_rng(seed), embedding_dim=3))
    assert len(list(tmp_path.iterdir())) == 2
    load_pseudo_masks(path)


def test_mixed_embeddings_are_refused(tmp_path):
    rle = rle_of(np.ones((3, 3)))
    masks = [PseudoMask(rle, 1.0, np.zeros(2)), PseudoMask(rle, 1.0)]
    with pytest.raises(ValueError, match="1 of 2 masks have no embedding"):
        write_pseudo_masks(tmp_path / "x.json", [ImageRecord("a.jpg", 3, 3, 1, masks)])
    assert os.listdir(tmp_path) == []


def test_sidecar_errors(tmp_path):
    path = tmp_path / "masks.json"
    write_pseudo_masks(path, random_records(np.random.default_rng(0), embedding_dim=3))
    sidecar = next(p for p in tmp_path.iterdir() if p.suffix == ".npy")
    data = sidecar.read_bytes()
    sidecar.write_bytes(data[:-2] + b"xx")
    with pytest.raises(PseudoMaskError, match="not the file that was written with"):
        load_pseudo_masks(path)
    sidecar.unlink()
    with pytest.raises(PseudoMaskError, match="does not exist"):
        load_pseudo_masks(path)
    content = json.loads(path.read_text())
    content["info"]["embeddings"]["file"] = "../other.npy"
    path.write_text(json.dumps(content))
    with pytest.raises(PseudoMaskError, match="beside the JSON"):
        load_pseudo_masks(path)


def freesolo_file():
    """The layout of the released FreeSOLO files: XYXY boxes, no areas, duplicate ids."""
    pixels = np.zeros((20, 30), dtype=bool)
    pixels[4:9, 10:21] = True
    annotation = {
        "segmentation": {"size": [20, 30], "counts": rle_of(pixels)["counts"].decode()},
        "bbox": [9.5, 3.5, 20.5, 8.5],
        "score": 0.8,
        "emb": [0.5, -1.0, 2.0],
        "iscrowd": 0,
        "image_id": 7,
        "category_id": 1,
        "id": 0,
    }
    return {
        "images": [{"file_name": "train2017/7.jpg", "height": 20, "width": 30, "id": 7}],
        "annotations": [annotation, copy.deepcopy(annotation)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 81)],
    }


def test_released_freesolo_files_are_read(tmp_path):
    path = tmp_path / "freesolo.json"
    path.write_text(json.dumps(freesolo_file()))
    (record,) = load_pseudo_masks(path)
    assert [m.box for m in record.masks] == [[10, 4, 11, 5]] * 2
    assert [m.area for m in record.masks] == [55, 55]
    np.testing.assert_array_equal(record.masks[0].embedding, [0.5, -1.0, 2.0])


def test_masks_without_a_pixel_and_crowds_are_left_out(tmp_path, caplog):
    content = freesolo_file()
    first = content["annotations"][0]
    empty = {"size": [20, 30], "counts": [600]}
    content["annotations"][1:] = [first | {"segmentation": empty}, first | {"iscrowd": 1}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with caplog.at_level("WARNING", logger="unseg"):
        (record,) = load_pseudo_masks(path)
    assert len(record.masks) == 1
    assert "left out 2 crowd regions and masks without a pixel" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "'images' is missing"),
        (lambda c: c.update(annotations={}), "'annotations' is missing or not a list"),
        (lambda c: c["images"][0].pop("height"), r"images\[0\] \(id 7\): 'height' is missing"),
        (lambda c: c["images"][0].update(width=-3), r"images\[0\] \(id 7\): size 20x-3"),
        (lambda c: c["images"].append(c["images"][0]), r"images\[1\]: id 7 is used"),
        (lambda c: c["annotations"][1].update(image_id=9), r"annotations\[1\].*no image"),
        (
            lambda c: c["annotations"][1].update(score="high"),
            r"annotations\[1\].*'score' is 'high'",
        ),
        (lambda c: c["annotations"][1].update(emb=["a"]), r"annotations\[1\].*'emb'"),
        (lambda c: c["annotations"][1].pop("segmentation"), r"'segmentation' is missing"),
        (lambda c: c["annotations"].__setitem__(1, 3), r"annotations\[1\] is not an object"),
        (
            lambda c: c["annotations"][1].update(segmentation={"size": [3, 3], "counts": [9]}),
            r"annotations\[1\] \(id 0, image 7\).*size is \[3, 3\], the image is \[20, 30\]",
        ),
    ],
)
def test_malformed_records_are_named(tmp_path, change, message):
    content = freesolo_file()
    change(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PseudoMaskError, match=message) as caught:
        load_pseudo_masks(path)
    assert str(path) in str(caught.value)


def test_not_json(tmp_path):
    path = tmp_path / "x.json"
    for text in ("", "{", "[]", "\x00"):
        path.write_text(text)
        with pytest.raises(PseudoMaskError, match=r"x\.json"):
            load_pseudo_masks(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PseudoMaskError, match="not a JSON file"):
        load_pseudo_masks(path)


json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-9, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_mutation_is_read_or_named(tmp_path_factory, data):
    """Replace or remove one value anywhere: a clean result or PseudoMaskError."""
    content = copy.deepcopy(freesolo_file())
    content["annotations"] = content["annotations"][:1]
    spots = []

    def walk(node):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            spots.append((node, key))
            if isinstance(child, dict | list) and key not in ("categories", "emb"):
                walk(child)

    walk(content)
    node, key = data.draw(st.sampled_from(spots))
    if data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(content))
    try:
        records = load_pseudo_masks(path)
    except PseudoMaskError as error:
        assert "mutated.json" in str(error)
        return
    for record in records:
        for mask in record.masks:
            assert mask.decode().shape == (record.height, record.width)
            assert mask.area > 0
