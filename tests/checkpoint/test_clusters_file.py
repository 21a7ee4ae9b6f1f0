"""The file of clusters: to the last bit, and without pickles."""

import json

import numpy as np
import pytest
import torch

from unseg.checkpoint import CheckpointError, load_clusters, save_clusters
from unseg.structures import Clusters

SUFFIXES = (".npz", ".pth")


def some_clusters(classes=True, **options):
    generator = torch.Generator().manual_seed(3)
    centroids = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return Clusters(
        centroids, classes=torch.tensor([4, -1, 0, 4, 2]) if classes else None, **options
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "clusters",
    [some_clusters(c=0.3), some_clusters(False), some_clusters(False, geometry="euclidean")],
)
def test_round_trip(tmp_path, suffix, clusters):
    path = tmp_path / f"x{suffix}"
    save_clusters(path, clusters, {"k": 5, "history": [1.5, 1.0]})
    found, info = load_clusters(path)
    assert info == {"k": 5, "history": [1.5, 1.0]}
    assert (found.geometry, found.c) == (clusters.geometry, clusters.c)
    assert found.centroids.dtype == torch.float64
    assert torch.equal(found.centroids, clusters.centroids)
    if clusters.classes is None:
        assert found.classes is None
    else:
        assert found.classes.tolist() == [4, -1, 0, 4, 2]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_others_can_read_them(tmp_path):
    save_clusters(tmp_path / "x.npz", some_clusters())
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert set(file.files) == {"info", "centroids", "classes"}
        assert json.loads(file["info"].item())["geometry"] == "poincare"
        np.testing.assert_array_equal(file["centroids"], some_clusters().centroids.numpy())
    save_clusters(tmp_path / "x.pth", some_clusters())
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert torch.equal(content["centroids"], some_clusters().centroids)


def test_equal_clusters_give_equal_bytes(tmp_path):
    for name, info in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        save_clusters(tmp_path / f"{name}.npz", some_clusters(), info)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_what_is_not_written(tmp_path):
    path = tmp_path / "x.npz"
    save_clusters(path, some_clusters())
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"x\.npz: not written: info is not JSON"):
        save_clusters(path, some_clusters(), {"x": torch.zeros(2)})
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match=r"x\.json: not written: it must end in \.npz"):
        save_clusters(tmp_path / "x.json", some_clusters())
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_and_foreign_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(FileNotFoundError, match=f"x{suffix}: no such file of clusters"):
        load_clusters(path)
    save_clusters(path, some_clusters())
    whole = path.read_bytes()
    for data in (whole[:-40], whole[: len(whole) // 2], b"", b"not a file of arrays"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"x{suffix}"):
            load_clusters(path)
    other = tmp_path / "x.txt"
    other.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"x\.txt: a file of clusters ends in"):
        load_clusters(other)


def header(**changes):
    content = {"format": "unseg clusters 1", "geometry": "poincare", "c": 1.0, "info": {}} | changes
    return json.dumps(content)


POINTS = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"centroids": POINTS}, "no text 'info' in it"),
        ({"info": "{", "centroids": POINTS}, "'info' is not JSON"),
        ({"info": header(format="x"), "centroids": POINTS}, "the format is 'x'"),
        ({"info": header(c="1"), "centroids": POINTS}, "'c' in 'info'"),
        ({"info": header(c=True), "centroids": POINTS}, "'c' in 'info'"),
        ({"info": header(c=-1.0), "centroids": POINTS}, "c must be above 0"),
        ({"info": header(geometry="flat"), "centroids": POINTS}, "geometry: one of"),
        ({"info": header(info=[]), "centroids": POINTS}, "'info' in 'info'"),
        ({"info": header()}, "'centroids' is missing or no array"),
        ({"info": header(), "centroids": POINTS.astype(np.float32)}, "must be float64"),
        ({"info": header(), "centroids": POINTS[0]}, r"\(K, D\) is needed"),
        ({"info": header(), "centroids": POINTS + np.nan}, "NaN/inf"),
        (
            {"info": header(), "centroids": POINTS, "classes": np.zeros(3, int)},
            "classes: 2 numbers",
        ),
        ({"info": header(), "centroids": POINTS, "classes": np.zeros(2)}, "must be int64"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_another_content(tmp_path, suffix, content, message):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **{key: np.array(value) for key, value in content.items()})
    else:
        torch.save(
            {k: v if isinstance(v, str) else torch.from_numpy(v) for k, v in content.items()}, path
        )
    with pytest.raises(CheckpointError, match=f"x{suffix}: .*{message}"):
        load_clusters(path)


class Code:
    def __reduce__(self):
        return (eval, ("1 / 0",))


def test_code_is_not_run(tmp_path):
    np.savez(tmp_path / "x.npz", info=np.array([Code()], dtype=object))
    torch.save({"info": header(), "centroids": Code()}, tmp_path / "x.pth")
    for suffix in SUFFIXES:
        with pytest.raises(CheckpointError, match=f"x{suffix}"):
            load_clusters(tmp_path / f"x{suffix}")
