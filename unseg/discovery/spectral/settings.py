"""Settings of spectral segmentation; see unseg/config/deep_spectral.py, which has the same keys."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from detectron2.config import CfgNode

from unseg.discovery.spectral.channels import NCR_MODES
from unseg.discovery.spectral.eigen import SOLVERS
from unseg.discovery.spectral.graphs import AFFINITIES

BACKGROUNDS = ("quotient", "reference", "drop")
CLUSTER_MODES = ("auto", "eigengap", "fixed", "oracle")


@dataclass(frozen=True)
class NCRSettings:
    enabled: bool = True
    bins: int = 30
    divisor: int = 3
    mode_foreground: str = "paper"
    mode_instances: str = "paper"


@dataclass(frozen=True)
class DCRSettings:
    enabled: bool = True
    keep_ratio: float = 60 / 128


@dataclass(frozen=True)
class ForegroundSettings:
    border: int = 5
    border_ratio: float = 0.9
    min_area_ratio: float = 0.1
    area: str = "pixels"
    median: int = 3


@dataclass(frozen=True)
class ClusterSettings:
    mode: str = "auto"
    num: int = 3
    max_num: int = 8
    min_silhouette: float = 0.35
    seed: int = 0
    num_init: int = 10


@dataclass(frozen=True)
class SpectralSettings:
    """All settings of :func:`unseg.discovery.spectral_masks`.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    ncr: NCRSettings = field(default_factory=NCRSettings)
    dcr: DCRSettings = field(default_factory=DCRSettings)
    foreground: ForegroundSettings = field(default_factory=ForegroundSettings)
    clusters: ClusterSettings = field(default_factory=ClusterSettings)
    affinity: str = "boc"
    background: str = "quotient"
    num_eigenvectors: int = 4
    embedding_median: int = 5
    solver: str = "auto"
    split_components: bool = True
    min_area: float = 0.01
    upsample: str = "bilinear"
    embedding_dim: int = 128

    def __post_init__(self) -> None:
        choices = {
            "AFFINITY": (self.affinity, AFFINITIES),
            "BACKGROUND": (self.background, BACKGROUNDS),
            "SOLVER": (self.solver, SOLVERS),
            "UPSAMPLE": (self.upsample, ("bilinear", "nearest")),
            "EMBEDDING_MEDIAN": (self.embedding_median, (1, 3, 5)),
            "FOREGROUND.MEDIAN": (self.foreground.median, (1, 3, 5)),
            "FOREGROUND.AREA": (self.foreground.area, ("pixels", "polygon")),
            "NCR.MODE_FOREGROUND": (self.ncr.mode_foreground, NCR_MODES),
            "NCR.MODE_INSTANCES": (self.ncr.mode_instances, NCR_MODES),
            "CLUSTERS.MODE": (self.clusters.mode, CLUSTER_MODES),
        }
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"DEEP_SPECTRAL.{key} must be one of {allowed}, got {value!r}")
        least_one = {
            "NUM_EIGENVECTORS": self.num_eigenvectors,
            "EMBEDDING_DIM": self.embedding_dim,
            "NCR.BINS": self.ncr.bins,
            "NCR.DIVISOR": self.ncr.divisor,
            "CLUSTERS.NUM": self.clusters.num,
            "CLUSTERS.MAX_NUM": self.clusters.max_num,
            "CLUSTERS.NUM_INIT": self.clusters.num_init,
            "FOREGROUND.BORDER": self.foreground.border,
        }
        for key, value in least_one.items():
            if value < 1:
                raise ValueError(f"DEEP_SPECTRAL.{key} must be at least 1, got {value}")
        if not 0 < self.dcr.keep_ratio <= 1:
            raise ValueError(
                f"DEEP_SPECTRAL.DCR.KEEP_RATIO must be in (0, 1], got {self.dcr.keep_ratio}"
            )
        ranges = {
            "FOREGROUND.BORDER_RATIO": (self.foreground.border_ratio, 0, 1),
            "FOREGROUND.MIN_AREA_RATIO": (self.foreground.min_area_ratio, 0, 1),
            "CLUSTERS.MIN_SILHOUETTE": (self.clusters.min_silhouette, -1, 1),
            "CLUSTERS.SEED": (self.clusters.seed, 0, 2**32 - 1),
            "MIN_AREA": (self.min_area, 0, 1),
        }
        for key, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise ValueError(f"DEEP_SPECTRAL.{key} must be from {low} to {high}, got {value}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SpectralSettings":
        return cls.from_node(cfg.MODEL.DEEP_SPECTRAL)

    @classmethod
    def from_node(cls, node: dict[str, Any]) -> "SpectralSettings":
        """From a config node with the same keys in capitals; other keys are not looked at."""
        return _from_node(cls, node)


def _from_node(cls: type, node: dict[str, Any]) -> Any:
    values = {}
    for entry in fields(cls):
        value = node[entry.name.upper()]
        nested = entry.default_factory
        values[entry.name] = _from_node(nested, value) if is_dataclass(nested) else value
    return cls(**values)
