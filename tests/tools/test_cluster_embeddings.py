"""python -m unseg.tools.cluster_embeddings, as users run it."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.engine import launch
from PIL import Image

from unseg.checkpoint import load_clusters
from unseg.data import EmbeddingRows, EmbeddingWriter
from unseg.tools import cluster_embeddings

C = 0.5
DIM = 3
SIZES = (40, 25, 10, 5)
# Far from each other: 0.3 wide, some 1.5 apart.
CENTERS = np.array([[1.2, 0, 0], [-1.2, 0.3, 0], [0, 1.2, -0.8], [0, -0.2, 1.2]])
KEY = "MODEL.HIERARCHICAL_EMBEDDING.CLUSTERING."

pytestmark = pytest.mark.usefixtures("restored_loggers")


def blobs():
    """float32 (80, 3) tangents and their blobs, shuffled."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), SIZES))
    return (CENTERS[labels] + rng.normal(size=(80, DIM)) * 0.05).astype(np.float32), labels


def write_store(path, *, classes=True, geometry="poincare", tangents=None):
    found, labels = blobs()
    tangents = found if tangents is None else tangents
    writer = EmbeddingWriter(path, dim=DIM, geometry=geometry, c=C)
    for rows in np.array_split(np.arange(len(tangents)), 3):
        writer.add(
            EmbeddingRows(
                image_ids=rows.astype(np.int64),
                scores=np.ones(len(rows), np.float32),
                boxes=np.ones((len(rows), 4), np.float32),
                areas=np.ones(len(rows), np.int64),
                classes=labels[rows] if classes else np.full(len(rows), -1),
                tangents=tangents[rows],
            )
        )
    writer.finish({"dataset": "blobs"})
    return path


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store")


def run_here(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cluster_embeddings", *map(str, words)])
    cluster_embeddings.main()


def error_of(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, *words)
    assert caught.value.code not in (0, None)
    return f"{caught.value.code}{capsys.readouterr().err}"


def table_of(text):
    """The rows of the printed table by its headers."""
    lines = [x.strip("| ").split("|") for x in text.splitlines() if x.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def midpoints(tangents, labels):
    """Tangents of the normalised means on the hyperboloid, straight from its formulas."""
    s = C**0.5
    u = tangents.astype(np.float64)
    norm = np.linalg.norm(u, axis=1, keepdims=True)
    points = np.concatenate([np.cosh(2 * s * norm), np.sinh(2 * s * norm) * u / norm], axis=1)
    result = []
    for label in range(4):
        total = points[labels == label].sum(0)
        total /= np.sqrt(total[0] ** 2 - (total[1:] ** 2).sum())
        direction = total[1:] / np.linalg.norm(total[1:])
        result.append(np.arccosh(total[0]) / (2 * s) * direction)
    return np.array(result)


def matched(clusters):
    """Rows of (4, 3) in the order of the blobs."""
    centroids = clusters.centroids.numpy()
    nearest = np.linalg.norm(centroids[None] - CENTERS[:, None], axis=2).argmin(1)
    assert sorted(nearest) == [0, 1, 2, 3]
    return centroids[nearest]


def test_clusters_of_a_store(store, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out/clusters.npz"
    run_here(monkeypatch, store, "--output", output, "--anchor", KEY + "K", 4, KEY + "N_INIT", 3)
    clusters, info = load_clusters(output)
    assert (len(clusters), clusters.geometry, clusters.c, clusters.classes) == (
        4,
        "poincare",
        C,
        None,
    )
    tangents, labels = blobs()
    np.testing.assert_allclose(matched(clusters), midpoints(tangents, labels), rtol=1e-9, atol=1e-9)
    report = json.loads((tmp_path / "out/clusters.json").read_text())
    assert sorted(report["sizes"]) == sorted(SIZES)
    assert report["store"]["dataset"] == info["store"]["dataset"] == "blobs"
    assert report["history"] == sorted(report["history"], reverse=True)
    assert report["k"] == 4
    out = capsys.readouterr().out
    assert "80 objects, 3 dimensions, poincare, c = 0.5" in out
    found, anchor = table_of(out)
    assert (found["centroid"], anchor["centroid"]) == ("lorentz", "kmeans")
    for row in (found, anchor):
        assert row["K"] == "4"
        assert row["sizes 0/25/50/75/100 %"] == "5/5/10/25/40"
        assert float(row["NMI"]) == float(row["ACC"]) == float(row["purity"]) == 100
    # Equal clusters, equal midpoints, equal distances to them.
    for key in ("mean cosh(sd)-1", "mean d^2"):
        assert float(found[key]) == pytest.approx(float(anchor[key]), rel=1e-4)
    squares = ((tangents - matched(clusters)[labels]) ** 2).sum()
    assert float(anchor["objective"]) == pytest.approx(squares, rel=0.05)


def test_the_same_again(store, tmp_path, monkeypatch):
    for name in ("a", "b"):
        run_here(monkeypatch, store, "--output", tmp_path / f"{name}.npz", KEY + "K", 6)
    for suffix in (".npz", ".json"):
        first, second = (tmp_path / f"{name}{suffix}" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
    run_here(monkeypatch, store, "--output", tmp_path / "c.pth", KEY + "K", 6)
    first, second = (load_clusters(tmp_path / name)[0] for name in ("a.npz", "c.pth"))
    assert torch.equal(first.centroids, second.centroids)


def test_settings_reach_the_clustering(tmp_path, monkeypatch, capsys):
    store = write_store(tmp_path / "store", classes=False)
    (tmp_path / "x.yaml").write_text(
        "VERSION: 2\nMODEL: {HIERARCHICAL_EMBEDDING: {CLUSTERING: {K: 5, CENTROID: frechet}}}\n"
    )
    run_here(monkeypatch, store, "--config-file", tmp_path / "x.yaml", "--output",
             tmp_path / "x.npz", KEY + "SEED", 3, KEY + "MAX_ITER", 1)  # fmt: skip
    _, info = load_clusters(tmp_path / "x.npz")
    assert (info["k"], info["centroid"], info["n_iter"]) == (5, "frechet", 1)
    assert info["settings"]["seed"] == 3
    (row,) = table_of(capsys.readouterr().out)
    assert row["stopped by"] == "max_iter"
    assert "NMI" not in row  # no classes are known


def test_euclidean_clusters(tmp_path, monkeypatch, capsys):
    tangents, labels = blobs()
    for number, geometry in enumerate(("euclidean", "poincare")):
        store = write_store(tmp_path / geometry, geometry=geometry)
        output = tmp_path / f"{geometry}.npz"
        flags = [KEY + "CENTROID", "kmeans"] if number else []
        run_here(monkeypatch, store, "--output", output, KEY + "K", 4, KEY + "N_INIT", 3, *flags)
        clusters, info = load_clusters(output)
        assert (clusters.geometry, info["centroid"]) == ("euclidean", "kmeans")
        means = np.stack([tangents[labels == n].astype(np.float64).mean(0) for n in range(4)])
        np.testing.assert_allclose(matched(clusters), means, rtol=1e-5, atol=1e-6)
    assert "the store is Euclidean: scikit-learn's k-means" in capsys.readouterr().out


def test_elbow(store, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        run_here(monkeypatch, store, "--elbow", "--grid", 2, 3, 4, 6, 9, 14, "--plot",
                 tmp_path / f"{name}.png", KEY + "N_INIT", 3)  # fmt: skip
    out = capsys.readouterr().out
    table = out[out.index("monotone") :].splitlines()[1:7]
    assert [line.split()[0] for line in table] == ["2", "3", "4", "6", "9", "14"]
    assert "knee: 4 over K, 4 over log K" in out  # four blobs
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 200
    run_here(monkeypatch, store, "--elbow", KEY + "CENTROID", "kmeans")  # a grid of its own
    assert "knee: " in capsys.readouterr().out


def test_wrong_flags(store, tmp_path, monkeypatch, capsys):
    for flags, message in (
        ([], "either --output FILE or --elbow"),
        (["--elbow", "--output", "x.npz"], "either --output FILE or --elbow"),
        (["--output", "x.npz", "--plot", "x.png"], "--grid and --plot are for --elbow"),
        (["--output", "x.json"], r"must end in .npz or .pth"),
        (["--elbow", "--num-gpus", 2], "1 with --elbow"),
        (["--elbow", "--name-by", "x"], "--anchor and --name-by are for --output"),
        (["--output", "x.npz", "--num-gpus", 0], "at least 1"),
    ):
        assert message in error_of(monkeypatch, capsys, store, *flags)


def test_what_cannot_be_clustered(store, tmp_path, monkeypatch, capsys):
    empty = write_store(tmp_path / "empty", tangents=np.zeros((0, DIM), np.float32))
    twice = write_store(tmp_path / "twice", tangents=np.ones((5, DIM), np.float32))
    for where, flags, message in (
        (tmp_path, [], "no embedding store"),
        (store, [KEY + "K", 2, "--name-by", "unseg_synthetic_val"], "have no masks to be matched"),
        (empty, [], "empty: the store holds no objects"),
        (twice, [KEY + "K", 2], "only 1 different points"),
        (store, [], "k = 1462"),
        (store, [KEY + "K", 0], "CLUSTERING.K"),
        (store, [KEY + "CENTROID", "mean"], "CLUSTERING.CENTROID: one of"),
        (store, [KEY + "CENTER", "mean"], "Non-existent"),
        (store, [KEY + "K"], "Override list has odd length"),
        (store, ["--config-file", tmp_path / "no.yaml"], "no.yaml"),
    ):
        output = tmp_path / "out/x.npz"
        assert message in error_of(monkeypatch, capsys, where, "--output", output, *flags)
        assert not output.parent.exists()
    assert "three different numbers" in error_of(
        monkeypatch, capsys, store, "--elbow", "--grid", 2, 3
    )
    (store / "shard-00001.npz").write_bytes(b"x")
    message = error_of(monkeypatch, capsys, store, "--output", output, KEY + "K", 2)
    assert "shard-00001.npz: damaged" in message


@pytest.mark.skipif(
    "GLOO" not in inspect.getsource(inspect.getmodule(launch)) or torch.cuda.is_available(),
    reason="Detectron2 0.5 launches several processes on GPUs only",
)
def test_several_processes_give_the_same_bytes(store, tmp_path, monkeypatch):
    run_here(monkeypatch, store, "--output", tmp_path / "one.npz", KEY + "K", 6)
    command = [sys.executable, "-m", "unseg.tools.cluster_embeddings", store, "--num-gpus", 2]
    done = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "two.npz"), KEY + "K", "6"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("6 |") == 1
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
