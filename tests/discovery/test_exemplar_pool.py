"""The exemplar pool's file: written whole, read back exactly, refused with the array's name."""

import json
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.discovery import ExemplarError, load_exemplar_pool, save_exemplar_pool
from unseg.structures import Exemplar, ExemplarPool


def an_exemplar(rng, category="cat", dim=5, **changes):
    h, w = rng.integers(1, 30, 2).tolist()
    mask = rng.random((h, w)) < 0.4
    mask[rng.integers(h), rng.integers(w)] = True
    fields = {
        "image": rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
        "mask": mask,
        "category": category,
        "file_name": f"{category}/ä {rng.integers(99)}.jpg",
        "box": (3, 0, 3 + w, 7),
        "mask_from": ("refined", "coarse", "whole")[rng.integers(3)],
        "embedding": rng.normal(size=dim).astype(np.float32),
    }
    return Exemplar(**fields | changes)


def a_pool(seed=0, categories=("cat", "cat", "cat", "dog", "newt")):
    rng = np.random.default_rng(seed)
    exemplars = tuple(an_exemplar(rng, category) for category in categories)
    return ExemplarPool(exemplars, {"source": "folder", "settings": {"b": 1.5, "a": [1, None]}})


def assert_equal(found, expected):
    assert found.info == expected.info
    assert len(found) == len(expected)
    for a, b in zip(found.exemplars, expected.exemplars, strict=True):
        for name in ("image", "mask", "embedding"):
            assert getattr(a, name).dtype == getattr(b, name).dtype
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for name in ("category", "file_name", "box", "mask_from"):
            assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("seed", range(4))
def test_round_trip(tmp_path, seed):
    pool = a_pool(seed)
    save_exemplar_pool(tmp_path / "new folder" / "pool.npz", pool)
    assert_equal(load_exemplar_pool(tmp_path / "new folder" / "pool.npz"), pool)


def test_a_path_without_npz_is_kept(tmp_path):
    save_exemplar_pool(str(tmp_path / "pool"), a_pool())
    assert os.listdir(tmp_path) == ["pool"]


def test_numpy_alone_reads_it(tmp_path):
    pool = a_pool()
    save_exemplar_pool(tmp_path / "pool.npz", pool)
    with np.load(tmp_path / "pool.npz", allow_pickle=False) as file:
        keys = [f"{kind}/{i:05d}" for i in range(5) for kind in ("image", "mask")]
        assert set(file.files) == {"info", "embeddings", *keys}
        header = json.loads(str(file["info"]))
        assert header["format"] == "unseg exemplar pool 1"
        assert header["info"] == pool.info
        assert header["exemplars"][3] == {
            "category": "dog",
            "file_name": pool.exemplars[3].file_name,
            "box": list(pool.exemplars[3].box),
            "mask_from": pool.exemplars[3].mask_from,
        }
        np.testing.assert_array_equal(file["embeddings"][3], pool.exemplars[3].embedding)
        np.testing.assert_array_equal(file["image/00003"], pool.exemplars[3].image)
        np.testing.assert_array_equal(file["mask/00003"], pool.exemplars[3].mask)


def test_equal_pools_give_equal_bytes(tmp_path, monkeypatch):
    pool = a_pool()
    save_exemplar_pool(tmp_path / "a.npz", pool)
    later = time.time() + 1e8
    monkeypatch.setattr(time, "time", lambda: later)
    # Equal, but with the keys in another order and the arrays in another layout of memory.
    info = {"settings": {"a": [1, None], "b": 1.5}, "source": "folder"}
    again = []
    for exemplar in pool.exemplars:
        fields = dict(vars(exemplar))
        fields["box"] = tuple(np.int64(side) for side in exemplar.box)
        fields["image"] = exemplar.image.repeat(2, axis=0)[::2]
        again.append(Exemplar(**fields))
    save_exemplar_pool(tmp_path / "b.npz", ExemplarPool(tuple(again), info))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_first_of_each_category(tmp_path):
    pool = a_pool()
    save_exemplar_pool(tmp_path / "pool.npz", pool)
    for count, kept in ((0, [0, 1, 2, 3, 4]), (1, [0, 3, 4]), (2, [0, 1, 3, 4])):
        expected = ExemplarPool(tuple(pool.exemplars[i] for i in kept), pool.info)
        assert_equal(load_exemplar_pool(tmp_path / "pool.npz", count), expected)


def bad(**changes):
    rng = np.random.default_rng(1)
    return ExemplarPool((an_exemplar(rng), an_exemplar(rng, **changes)))


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (ExemplarPool(()), "holds no exemplars"),
        (bad(embedding=None), "holds no embeddings"),
        (bad(embedding=np.zeros(3, np.float32)), "shape"),
        (bad(embedding=np.full(5, np.nan, np.float32)), "'embeddings' holds NaN"),
        (bad(mask=np.zeros((4, 4), bool), image=np.zeros((4, 4, 3), np.uint8)), "1' is empty"),
        (bad(mask=np.ones((4, 4), bool), image=np.zeros((4, 5, 3), np.uint8)), "'mask/00001'"),
        (bad(image=np.zeros((4, 5, 3), np.float32)), r"'image/00001' must be \(H, W, 3\) uint8"),
        (bad(image=np.zeros((4, 5, 1), np.uint8)), r"'image/00001' must be \(H, W, 3\) uint8"),
        (bad(mask=np.ones((4, 5), np.uint8)), r"'mask/00001' must be \(H, W\) bool"),
        (bad(box=(3, 3, 3, 7)), r"exemplars\[1\]: 'box'"),
        (bad(box=(-1, 3, 3, 7)), r"exemplars\[1\]: 'box'"),
        (bad(box=(1, 3, 3)), r"exemplars\[1\]: 'box'"),
        (bad(mask_from="guess"), r"exemplars\[1\]: 'mask_from'"),
        (bad(category=3), r"exemplars\[1\]: 'category'"),
        (ExemplarPool(bad().exemplars, {"when": object()}), "info is not JSON"),
        (ExemplarPool(bad().exemplars, {"loss": float("nan")}), "info is not JSON"),
    ],
)
def test_what_is_not_written(tmp_path, pool, message):
    (tmp_path / "pool.npz").write_bytes(b"the old one")
    with pytest.raises(ExemplarError, match=message) as caught:
        save_exemplar_pool(tmp_path / "pool.npz", pool)
    assert str(tmp_path / "pool.npz") in str(caught.value)
    assert os.listdir(tmp_path) == ["pool.npz"]
    assert (tmp_path / "pool.npz").read_bytes() == b"the old one"


def contents(tmp_path):
    save_exemplar_pool(tmp_path / "good.npz", a_pool())
    with np.load(tmp_path / "good.npz") as file:
        return dict(file)


def refused(path, message):
    with pytest.raises(ExemplarError, match=message) as caught:
        load_exemplar_pool(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["info", "embeddings", "image/00002", "mask/00004"])
def test_a_missing_array_is_named(tmp_path, key):
    arrays = contents(tmp_path)
    del arrays[key]
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", f"'{key}'")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embeddings", np.zeros((4, 5), np.float32), "for 5 exemplars"),
        ("embeddings", np.zeros((5, 0), np.float32), "for 5 exemplars"),
        ("embeddings", np.zeros((5, 5)), r"must be \(K, D\) float32"),
        ("embeddings", np.zeros(5, np.float32), r"must be \(K, D\) float32"),
        ("embeddings", np.full((5, 5), np.inf, np.float32), "NaN or infinite"),
        ("mask/00001", np.ones((31, 31), bool), "'mask/00001'"),
        ("image/00001", np.ones((31, 31, 4), np.uint8), "'image/00001'"),
        ("image/00001", np.array([None]), "pickle"),
        ("info", np.array(3), "no text 'info'"),
        ("info", np.array(["a", "b"]), "no text 'info'"),
        ("info", np.array("{"), "not JSON"),
        ("info", np.array("[1]"), "format is None"),
        ("info", np.array('{"format": "unseg exemplar pool 2"}'), "unseg exemplar pool 2"),
    ],
)
def test_an_array_that_does_not_fit_is_named(tmp_path, key, value, message):
    np.savez(tmp_path / "bad.npz", **contents(tmp_path) | {key: value})
    refused(tmp_path / "bad.npz", message)


def test_an_empty_mask_is_refused(tmp_path):
    arrays = contents(tmp_path)
    arrays["mask/00003"] = np.zeros_like(arrays["mask/00003"])
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", "'mask/00003' is empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["exemplars"].clear(), "holds no exemplars"),
        (lambda h: h.pop("exemplars"), "'exemplars' in 'info'"),
        (lambda h: h.update(info=[1]), "'info' in 'info'"),
        (lambda h: h["exemplars"].__setitem__(2, 3), r"exemplars\[2\] is not an object"),
        (lambda h: h["exemplars"][2].pop("file_name"), r"exemplars\[2\]: 'file_name'"),
        (lambda h: h["exemplars"][2].update(box=[0, 0, 2.5, 3]), r"exemplars\[2\]: 'box'"),
        (lambda h: h["exemplars"][2].update(mask_from=["coarse"]), r"exemplars\[2\]: 'mask_from'"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, change, message):
    arrays = contents(tmp_path)
    header = json.loads(str(arrays["info"]))
    change(header)
    np.savez(tmp_path / "bad.npz", **arrays | {"info": np.array(json.dumps(header))})
    refused(tmp_path / "bad.npz", message)


def test_what_is_no_pool_at_all(tmp_path):
    refused(tmp_path / "absent.npz", "no such exemplar pool")
    refused(tmp_path, "no such exemplar pool")
    for name, content in (("empty", b""), ("text", b"hello"), ("pickle", b"\x80\x04N.")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not an exemplar pool")
    np.save(tmp_path / "array.npy", np.zeros(3))
    refused(tmp_path / "array.npy", "not an exemplar pool")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    refused(tmp_path / "other.npz", "no text 'info'")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_right(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    pool = a_pool()
    save_exemplar_pool(folder / "pool.npz", pool)
    content = bytearray((folder / "pool.npz").read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    (folder / "pool.npz").write_bytes(content)
    try:
        assert_equal(load_exemplar_pool(folder / "pool.npz"), pool)
    except ExemplarError as error:
        assert str(folder / "pool.npz") in str(error)
