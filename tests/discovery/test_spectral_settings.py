"""Settings of spectral segmentation: their defaults, ranges and effects."""

from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from spectral_cases import structured, with_features

from unseg.config import add_unseg_config
from unseg.discovery.spectral import SpectralSettings, segment


def test_defaults_are_those_of_the_config():
    cfg = get_cfg()
    add_unseg_config(cfg)
    assert SpectralSettings.from_node(cfg.MODEL.DEEP_SPECTRAL) == SpectralSettings()
    node = cfg.MODEL.DEEP_SPECTRAL
    node.merge_from_list(["NCR.BINS", 7, "CLUSTERS.MODE", "fixed", "MIN_AREA", 0.5])
    settings = SpectralSettings.from_node(node)
    assert (settings.ncr.bins, settings.clusters.mode, settings.min_area) == (7, "fixed", 0.5)


def changed(settings, key, value):
    """The settings with a key such as "ncr.bins" changed."""
    head, _, rest = key.partition(".")
    if rest:
        value = changed(getattr(settings, head), rest, value)
    return replace(settings, **{head: value})


# A value with which each key changes the outcome, and what must be set for it.
EFFECTS = {
    "ncr.enabled": (False, {}),
    "ncr.bins": (5, {}),
    "ncr.divisor": (2, {}),
    "ncr.mode_foreground": ("reference_fg", {}),
    "ncr.mode_instances": ("reference_fg", {}),
    "dcr.enabled": (False, {}),
    "dcr.keep_ratio": (0.2, {}),
    "foreground.border": (1, {"foreground.border_ratio": 0.0}),
    "foreground.border_ratio": (0.0, {}),
    "foreground.min_area_ratio": (1.0, {"foreground.median": 1}),
    "foreground.area": ("polygon", {"foreground.median": 1}),
    "foreground.median": (1, {}),
    "clusters.mode": ("oracle", {}),
    "clusters.num": (5, {"clusters.mode": "fixed"}),
    "clusters.max_num": (2, {"clusters.min_silhouette": -1.0}),
    "clusters.min_silhouette": (0.99, {}),
    "clusters.seed": (3, {"clusters.mode": "fixed", "clusters.num": 8, "clusters.num_init": 1}),
    "clusters.num_init": (1, {"clusters.mode": "fixed", "clusters.num": 8}),
    "affinity": ("l1", {}),
    "background": ("drop", {}),
    "num_eigenvectors": (2, {}),
    "embedding_median": (1, {}),
    "split_components": (False, {"clusters.mode": "fixed"}),
    "min_area": (0.05, {}),
}
# What has its effect elsewhere, or none but in time.
ELSEWHERE = {"solver", "upsample", "embedding_dim"}


def keys_of(settings, prefix=""):
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            yield from keys_of(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def test_every_key_is_tested():
    assert set(keys_of(SpectralSettings())) == set(EFFECTS) | ELSEWHERE


@pytest.mark.parametrize("key", EFFECTS)
def test_every_key_has_an_effect(key):
    value, others = EFFECTS[key]
    base = SpectralSettings()
    for name, other in others.items():
        base = changed(base, name, other)
    tensors = [structured(*case)[1] for case in ((20, 30, 3, 1), (24, 25, 4, 1))]
    bar = np.zeros((20, 30), dtype=np.int64)
    bar[4:16, 4:10] = 1
    bar[4:16, 20] = 2
    tensors.append(torch.from_numpy(with_features(bar, 96)))
    for tensor in tensors:
        a, b = (segment(tensor, s, 3) for s in (base, changed(base, key, value)))
        if not (torch.equal(a.labels, b.labels) and torch.equal(a.fiedler, b.fiedler)):
            return
    raise AssertionError(f"{key} has no effect")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ncr.bins", 0),
        ("ncr.divisor", 0),
        ("ncr.mode_foreground", "reference"),
        ("ncr.mode_instances", "code"),
        ("dcr.keep_ratio", 0.0),
        ("dcr.keep_ratio", 1.1),
        ("foreground.border", 0),
        ("foreground.border_ratio", -0.1),
        ("foreground.border_ratio", 1.1),
        ("foreground.min_area_ratio", -0.1),
        ("foreground.min_area_ratio", 1.1),
        ("foreground.area", "contour"),
        ("foreground.median", 7),
        ("clusters.mode", "gt"),
        ("clusters.num", 0),
        ("clusters.max_num", 0),
        ("clusters.min_silhouette", -1.1),
        ("clusters.min_silhouette", 1.1),
        ("clusters.seed", -1),
        ("clusters.seed", 2**32),
        ("clusters.num_init", 0),
        ("affinity", "gauss"),
        ("background", "none"),
        ("num_eigenvectors", 0),
        ("embedding_median", 2),
        ("solver", "eigsh"),
        ("min_area", -0.1),
        ("min_area", 1.1),
        ("upsample", "bicubic"),
        ("embedding_dim", 0),
    ],
)
def test_settings_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"DEEP_SPECTRAL.{key.upper()} must be .* got"):
        changed(SpectralSettings(), key, value)
