"""Clusters that a config names reach the model's heads wherever the engine builds models."""

import shutil

import pytest
import torch
from quick_rcnn import CONFIG, QUICK

from unseg.checkpoint import CheckpointError, save_clusters
from unseg.config import load_config
from unseg.demo import Predictor
from unseg.engine import Trainer
from unseg.engine.clusters import attach_clusters
from unseg.engine.dataset_job import job_settings
from unseg.engine.find_masks import load_model
from unseg.structures import Clusters

DIM = 4
POINTS = torch.tensor([[0.1, 0, 0, 0], [-0.5, 0.2, 0, 1.0], [0, 0, 1, 0]], dtype=torch.float64)


def config(path, **changes):
    settings = QUICK | {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NAME": "HierarchicalEmbeddingROIHeads",
        "MODEL.HIERARCHICAL_EMBEDDING.EMBED_DIM": DIM,
        "MODEL.HIERARCHICAL_EMBEDDING.CONV_DIM": 8,
        "MODEL.HIERARCHICAL_EMBEDDING.FC_DIM": 8,
        "MODEL.HIERARCHICAL_EMBEDDING.INIT_STD": 0.5,
        "MODEL.HIERARCHICAL_EMBEDDING.CLUSTERS": str(path),
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(str(CONFIG), [x for item in settings.items() for x in item])


@pytest.fixture
def path(tmp_path):
    save_clusters(tmp_path / "c.npz", Clusters(POINTS))
    return tmp_path / "c.npz"


def found_by(model):
    inputs = [{"image": torch.arange(3 * 64 * 64, dtype=torch.uint8).reshape(3, 64, 64)}]
    with torch.no_grad():
        return model.eval()(inputs)[0]["instances"]


def test_all_ways_to_a_model(path):
    cfg = config(path)
    for model in (Trainer.build_model(cfg), load_model(cfg, True), Predictor(cfg).model):
        found = found_by(model)
        assert len(found) > 0
        # By the formula, in float64: the nearest of three centroids.
        u = found.pred_tangents.double()
        x, y = (torch.tanh(v.norm(dim=1, keepdim=True)) * v / v.norm(dim=1, keepdim=True)
                for v in (u, POINTS))  # fmt: skip
        gaps = [(1 - z.square().sum(1)) for z in (x, y)]
        distances = torch.acosh(
            1 + 2 * torch.cdist(x, y).square() / (gaps[0][:, None] * gaps[1][None])
        )
        assert torch.equal(found.pred_clusters, distances.argmin(1))
        nearest = distances.min(1).values.float()
        torch.testing.assert_close(found.cluster_distances, nearest, rtol=1e-4, atol=1e-4)
    assert not found_by(Trainer.build_model(config(""))).has("pred_clusters")


def test_no_clusters_no_heads_needed(tmp_path):
    model = torch.nn.Linear(1, 1)
    assert attach_clusters(model, config("")) is None
    with pytest.raises(
        CheckpointError, match=r"CLUSTERS .*x\.npz: .* give no embeddings: MODEL\.ROI"
    ):
        attach_clusters(model, config(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (Clusters(POINTS[:, :3].contiguous()), "of 3 dimensions"),
        (Clusters(POINTS, c=0.5), "c = 0.5"),
        (Clusters(POINTS, "euclidean"), "they are euclidean"),
    ],
)
def test_clusters_of_another_space(path, clusters, message):
    save_clusters(path, clusters)
    with pytest.raises(CheckpointError, match=rf"EMBEDDING\.CLUSTERS .*c\.npz: .*{message}"):
        Trainer.build_model(config(path))


def test_files_that_are_none(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file of clusters"):
        Trainer.build_model(config(tmp_path / "none.npz"))
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"c\.npz: no file of clusters"):
        load_model(config(path), True)


def test_jobs_go_by_the_content_of_the_file(path, tmp_path):
    shutil.copy(path, tmp_path / "copy.npz")
    first, same = (job_settings(config(p)) for p in (path, tmp_path / "copy.npz"))
    assert first == same
    save_clusters(path, Clusters(POINTS * 2))
    assert job_settings(config(path)) != first
    assert job_settings(config("")) != first
