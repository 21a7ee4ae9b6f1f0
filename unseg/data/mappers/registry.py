"""Mappers: from a dataset dict to what a model takes, chosen by ``cfg.INPUT.MAPPER``."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from fvcore.common.registry import Registry

MAPPERS = Registry("MAPPERS")
MAPPERS.__doc__ = "Mapper classes, built as ``Mapper(cfg, is_train)``."


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The mapper of ``cfg.INPUT.MAPPER``.

    Raises:
        KeyError: no mapper has that name; the message lists those that exist.
    """
    name = cfg.INPUT.MAPPER
    if name not in MAPPERS:
        known = ", ".join(sorted(key for key, _ in MAPPERS))
        raise KeyError(f"INPUT.MAPPER {name!r} is not a mapper; there are: {known}")
    return MAPPERS.get(name)(cfg, is_train)
