"""Discoverers: functions that find masks in the dense features of one image."""

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor

from unseg.structures import PseudoMask

DISCOVERERS = Registry("DISCOVERERS")
DISCOVERERS.__doc__ = """
Classes of discoverers, by the name in ``cfg.DISCOVERY.NAME``: their ``from_config(cfg)`` returns a
:class:`Discoverer`.
"""


class Discoverer(Protocol):
    """Finds the masks of one image.

    Args:
        features: (C, h, w) dense features on a grid that covers the image exactly.
        image_size: (H, W) in pixels, the size of the masks to return.
        dropped: counts why candidates were dropped; the discoverer adds to it.

    Returns:
        pseudo-masks in falling order of score.
    """

    def __call__(
        self, features: Tensor, image_size: tuple[int, int], *, dropped: Counter
    ) -> list[PseudoMask]: ...


class FunctionDiscoverer:
    """A function of features, image size and settings as a discoverer; subclasses name the parts.

    Attributes:
        settings_class: has ``from_config(cfg)``.
        find: called with features, image size, settings and ``dropped``.
    """

    settings_class: ClassVar[type]
    find: ClassVar[Callable[..., list[PseudoMask]]]

    def __init__(self, settings: Any):
        self.settings = settings

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Self:
        return cls(cls.settings_class.from_config(cfg))

    def __call__(
        self, features: Tensor, image_size: tuple[int, int], *, dropped: Counter
    ) -> list[PseudoMask]:
        return self.find(features, image_size, self.settings, dropped=dropped)


def build_discoverer(cfg: CfgNode) -> Discoverer:
    """The discoverer of ``cfg.DISCOVERY.NAME``.

    Raises:
        KeyError: no discoverer has that name; the message lists those that exist.
    """
    name = cfg.DISCOVERY.NAME
    if name not in DISCOVERERS:
        known = ", ".join(sorted(key for key, _ in DISCOVERERS))
        raise KeyError(f"DISCOVERY.NAME {name!r} is not a discoverer; there are: {known}")
    return DISCOVERERS.get(name).from_config(cfg)
