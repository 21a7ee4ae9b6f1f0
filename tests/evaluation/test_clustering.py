"""Clustering by the config's settings."""

import geoopt
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from unseg.config import get_cfg
from unseg.evaluation import ClusterSettings


def blobs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1.5, 0.0], [0.0, 1.5], [-1.5, 0.0], [0.0, 0.1]])
    labels = torch.arange(80) % 4
    return centres[labels] + 0.05 * torch.randn(80, 2, generator=generator), labels.numpy()


@pytest.mark.parametrize("centroid", ["lorentz", "frechet", "kmeans"])
@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
def test_finds_blobs(centroid, geometry):
    tangents, labels = blobs()
    found = ClusterSettings(k=4, centroid=centroid, geometry=geometry)(tangents)
    assert found.shape == (80,)
    assert found.dtype.kind == "i"
    assert adjusted_rand_score(labels, found) == 1


def test_clusters_are_of_the_ball():
    """Every point is of the cluster whose middle is nearest in the ball, which is not so for
    clusters of the tangent space."""
    generator = torch.Generator().manual_seed(3)
    tangents = 1.2 * torch.randn(300, 2, generator=generator)
    ball = geoopt.PoincareBall(2.0)
    points = ball.expmap0(tangents.double())

    def misplaced(labels):
        labels = torch.as_tensor(labels)
        middles = torch.stack(
            [ball.weighted_midpoint(points[labels == k], reducedim=[0]) for k in range(6)]
        )
        away = torch.stack([ball.dist(points, middle) for middle in middles], 1)
        return int((away.argmin(1) != labels).sum())

    settings = {"k": 6, "c": 2.0, "tol": 0.0, "max_iter": 300}
    assert misplaced(ClusterSettings(**settings)(tangents)) == 0
    assert misplaced(ClusterSettings(**settings, centroid="kmeans")(tangents)) > 10


@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
def test_fewer_clusters_than_asked_for(geometry, caplog):
    tangents = blobs()[0][:6]
    tangents[4:] = tangents[:2]
    found = ClusterSettings(k=1462, geometry=geometry)(tangents)
    assert found[4:].tolist() == found[:2].tolist()
    assert len(set(found.tolist())) == 4
    assert "4 clusters instead of 1462: there are 6 detections, 4 of them distinct" in caplog.text


@pytest.mark.parametrize(
    ("change", "match"),
    [({"k": 0}, "CLUSTERING.K"), ({"centroid": "mean"}, "CENTROID"), ({"geometry": "x"}, "geom")],
)
def test_bad_settings(change, match):
    with pytest.raises(ValueError, match=match):
        ClusterSettings(**change)


def test_settings_of_the_config():
    cfg = get_cfg()
    assert ClusterSettings.from_cfg(cfg) == ClusterSettings()
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING
    node.GEOMETRY, node.CURVATURE = "euclidean", 0.5
    clustering = node.CLUSTERING
    clustering.K, clustering.CENTROID, clustering.SEED = 7, "frechet", 3
    clustering.N_INIT, clustering.MAX_ITER, clustering.TOL, clustering.MINIBATCH = 2, 9, 0.1, 64
    expected = ClusterSettings(7, "frechet", 3, 2, 9, 0.1, 64, "euclidean", 0.5)
    assert ClusterSettings.from_cfg(cfg) == expected
