"""The embedding store: what is written is read, and what is not whole is refused by name."""

import json

import numpy as np
import pytest
from pycocotools import mask as mask_util

from unseg.data import EmbeddingRows, EmbeddingStoreError, EmbeddingWriter, open_embeddings

SIZE = (12, 9)
IDS = [[3, 3, 7], [], [8, 20, 20, 20]]
INFO = {"dataset": "toy", "counts": {"images": 5}}


def dense_masks(seed, count):
    masks = np.random.default_rng(seed).random((count, *SIZE)) < 0.3
    masks[:, 0, 0] = True
    return masks


def rows_of(ids, seed, masks=True, dim=4):
    rng = np.random.default_rng(seed)
    count = len(ids)
    dense = dense_masks(seed, count)
    rles = [mask_util.encode(np.asfortranarray(m.astype(np.uint8))) for m in dense]
    corners = np.sort(rng.random((count, 2, 2)) * 9, axis=1).reshape(count, 4)
    return EmbeddingRows(
        image_ids=np.array(ids, dtype=None if ids else np.int64),
        scores=rng.random(count).astype(np.float32),
        boxes=corners.astype(np.float32),
        areas=dense.sum((1, 2)).astype(np.int64),
        classes=rng.integers(-1, 3, count),
        tangents=rng.normal(size=(count, dim)).astype(np.float32),
        masks=rles if masks else None,
    )


def write(path, shards, info=INFO, **space):
    writer = EmbeddingWriter(path, **({"dim": 4, "geometry": "poincare", "c": 0.5} | space))
    for shard in shards:
        writer.add(shard)
    writer.finish(info)


def parts(**options):
    return [rows_of(ids, seed, **options) for seed, ids in enumerate(IDS)]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


COLUMNS = ("image_ids", "scores", "boxes", "areas", "classes", "tangents")


def assert_same(found, truth):
    assert found.dtype == truth.dtype
    np.testing.assert_array_equal(found, truth)


def test_round_trip(tmp_path):
    written = parts()
    write(tmp_path / "x", written)
    store = open_embeddings(tmp_path / "x")
    assert len(store) == 7
    assert (store.dim, store.geometry, store.c, store.has_masks) == (4, "poincare", 0.5, True)
    assert store.info == INFO | {"dim": 4, "geometry": "poincare", "c": 0.5}
    for name in COLUMNS:
        truth = np.concatenate([getattr(rows, name) for rows in written])
        assert_same(getattr(store, name), truth)
        # Any part of it, within shards and across them.
        for start, stop in ((0, 2), (1, 5), (3, 3), (4, 7), (5, 99)):
            assert_same(store.column(name, start, stop), truth[start:stop])
    read = list(store.shards())
    assert [len(rows) for rows in read] == [3, 0, 4]
    for number, (found, truth) in enumerate(zip(read, written, strict=True)):
        for name in COLUMNS:
            assert_same(getattr(found, name), getattr(truth, name))
        decoded = [mask_util.decode(rle).astype(bool) for rle in found.masks]
        np.testing.assert_array_equal(
            np.array(decoded).reshape(-1, *SIZE), dense_masks(number, len(truth))
        )
    with pytest.raises(KeyError, match="no column 'masks'"):
        store.column("masks")


def test_nothing_needs_a_pickle(tmp_path):
    write(tmp_path / "x", [rows_of(["a", "bc"], 0)])
    with np.load(tmp_path / "x/shard-00000.npz", allow_pickle=False) as file:
        assert all(file[key].dtype != object for key in file.files)
        assert {"tangents", "mask_counts", "mask_ends", "mask_sizes"} <= set(file.files)


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in "xy":
        write(tmp_path / name, parts())
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "y")
    assert {*bytes_of(tmp_path / "x")} == {
        "manifest.json", "shard-00000.npz", "shard-00001.npz", "shard-00002.npz"
    }  # fmt: skip


def test_no_rows_at_all(tmp_path):
    for name, shards in (("none", []), ("empty", [rows_of([], 0)])):
        write(tmp_path / name, shards)
        store = open_embeddings(tmp_path / name)
        assert len(store) == 0
        assert store.tangents.shape == (0, 4)
        assert store.tangents.dtype == np.float32
        assert store.boxes.shape == (0, 4)
        assert store.image_ids.shape == (0,)
        assert [len(rows) for rows in store.shards()] == [0] * len(shards)


def test_without_masks(tmp_path):
    write(tmp_path / "x", parts(masks=False))
    store = open_embeddings(tmp_path / "x")
    assert not store.has_masks
    assert all(rows.masks is None for rows in store.shards())
    assert len(store.tangents) == 7


def test_ids_may_be_text(tmp_path):
    write(tmp_path / "x", [rows_of(["2007_1", "2007_12"], 0), rows_of(["2008_000001"], 1)])
    assert open_embeddings(tmp_path / "x").image_ids.tolist() == [
        "2007_1",
        "2007_12",
        "2008_000001",
    ]


def test_an_earlier_store_is_replaced_whole(tmp_path):
    write(tmp_path / "x", parts())
    (tmp_path / "x/notes.txt").write_text("mine")
    writer = EmbeddingWriter(tmp_path / "x", dim=4, geometry="poincare", c=1.0)
    writer.add(rows_of([1], 9))
    with pytest.raises(EmbeddingStoreError, match=r"x: no embedding store: manifest\.json"):
        open_embeddings(tmp_path / "x")  # killed here, it is none
    writer.finish({})
    assert len(open_embeddings(tmp_path / "x")) == 1
    assert {*bytes_of(tmp_path / "x")} == {"manifest.json", "shard-00000.npz", "notes.txt"}


def changed(rows, **fields):
    return EmbeddingRows(**{**vars(rows), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tangents": np.zeros((3, 5), np.float32)}, r"'tangents' must be \(3, 4\) float32"),
        ({"tangents": np.zeros((3, 4))}, r"'tangents' must be .* it is \(3, 4\) float64"),
        ({"tangents": np.full((3, 4), np.nan, np.float32)}, "'tangents' holds NaN"),
        ({"scores": np.zeros(2, np.float32)}, r"'scores' must be \(3,\) float32"),
        ({"boxes": np.full((3, 4), np.inf, np.float32)}, "'boxes' holds NaN or infinite"),
        ({"classes": np.zeros(3, np.int32)}, r"'classes' must be \(3,\) int64"),
        ({"image_ids": np.array([2, 1, 3])}, "'image_ids' are not in order"),
        ({"image_ids": np.zeros(3)}, r"'image_ids' must be \(3,\) int64 or text"),
        ({"masks": []}, r"'mask_sizes' must be \(3, 2\)"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, fields, message):
    writer = EmbeddingWriter(tmp_path / "x", dim=4, geometry="poincare", c=1.0)
    with pytest.raises(EmbeddingStoreError, match=r"shard-00000\.npz: not written.*" + message):
        writer.add(changed(rows_of([3, 3, 7], 0), **fields))
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_masks_of_some_shards_only(tmp_path):
    writer = EmbeddingWriter(tmp_path / "x", dim=4, geometry="poincare", c=1.0)
    writer.add(rows_of([], 0, masks=False))
    writer.add(rows_of([1], 1))
    with pytest.raises(EmbeddingStoreError, match=r"shard-00002\.npz: .*others have none"):
        writer.add(rows_of([2], 2, masks=False))


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EmbeddingStoreError, match="file: not written: a file is there"):
        EmbeddingWriter(tmp_path / "file", dim=4, geometry="poincare", c=1.0)
    for space, message in (
        ({"dim": 0}, "'dim' must be at least 1"),
        ({"geometry": "flat"}, "'geometry' must be one of"),
        ({"c": 0.0}, "'c' must be above 0"),
    ):
        with pytest.raises(EmbeddingStoreError, match=message):
            write(tmp_path / "x", [], **space)
    with pytest.raises(EmbeddingStoreError, match=r"manifest\.json: not written: info is not JSON"):
        write(tmp_path / "x", [], {"x": np.zeros(2)})
    with pytest.raises(EmbeddingStoreError, match="no embedding store"):
        open_embeddings(tmp_path / "x")


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "x", parts())
    return tmp_path / "x"


def edit_manifest(store, **changes):
    path = store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_shard(**changes):
    return [{"file": "shard-00000.npz", "rows": 7, "sha256": "0"} | changes]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other 1"}, "the format is 'other 1'"),
        ({"rows": "7"}, "'rows' is missing or no int"),
        ({"rows": 8}, "'rows' is 8, the shards have 7"),
        ({"info": None}, "'info' is missing"),
        ({"shards": {}}, "'shards' is missing or no list"),
        ({"shards": one_shard(file="../shard-00000.npz")}, r"shards\[0\]"),
        ({"shards": one_shard(sha256=None)}, r"shards\[0\]: 'file', 'rows' and 'sha256'"),
        ({"shards": one_shard(rows=-7)}, r"shards\[0\]"),
        ({"shards": one_shard(file="shard-00009.npz")}, r"shard-00009\.npz is missing"),
        ({"dim": 4.0}, "'dim' must be at least 1"),
        ({"geometry": 3}, "'geometry' must be one of"),
        ({"c": True}, "'c' must be above 0"),
    ],
)
def test_foreign_manifests(store, changes, message):
    edit_manifest(store, **changes)
    with pytest.raises(EmbeddingStoreError, match=r"manifest\.json: .*" + message):
        open_embeddings(store)


@pytest.mark.parametrize("text", ["", "[1]", '{"format"', b"\xff\xfe"])
def test_manifests_that_are_none(store, text):
    (store / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EmbeddingStoreError, match=r"manifest\.json: (not JSON|the format is None)"):
        open_embeddings(store)


def test_truncated_foreign_and_changed_shards(store):
    shard = store / "shard-00002.npz"
    whole = shard.read_bytes()
    other = (store / "shard-00000.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (whole[:-50], b"", other, bytes(flipped)):
        shard.write_bytes(data)
        opened = open_embeddings(store)
        assert len(opened.column("tangents", 0, 3)) == 3  # the others are as they were
        with pytest.raises(
            EmbeddingStoreError, match=r"shard-00002\.npz: damaged, or not the file"
        ):
            _ = opened.tangents
    shard.unlink()
    with pytest.raises(EmbeddingStoreError, match=r"shard-00002\.npz is missing"):
        open_embeddings(store)


def rewrite_shard(store, **changes):
    """Another shard under its name, and its hash in the manifest: a writer of someone else's."""
    import hashlib

    path = store / "shard-00002.npz"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files} | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][2]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (store / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tangents": None}, "the array 'tangents' is missing"),
        ({"tangents": np.zeros((4, 3), np.float32)}, r"'tangents' must be \(4, 4\) float32"),
        ({"tangents": np.array([{}] * 4, dtype=object)}, "not a shard, or damaged: Object arrays"),
        ({"mask_ends": np.array([1, 0, 2, 3])}, "'mask_ends' do not divide"),
        ({"mask_counts": np.zeros(5)}, r"'mask_counts' must be \(L,\) uint8"),
        ({"mask_sizes": np.full((4, 2), 5, np.int32)}, "the mask of row 0 is malformed"),
        ({"mask_sizes": np.full((4, 2), -5, np.int32)}, "the mask of row 0 is malformed"),
    ],
)
def test_shards_of_another_content(store, changes, message):
    rewrite_shard(store, **changes)
    with pytest.raises(EmbeddingStoreError, match=r"shard-00002\.npz: .*" + message):
        list(open_embeddings(store).shards())
