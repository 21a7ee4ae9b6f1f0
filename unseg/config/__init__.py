"""Configuration: Detectron2's keys plus those of `unseg`, one file per method."""

from unseg.config.common import add_common_config
from unseg.config.discovery import add_discovery_config
from unseg.config.load import add_unseg_config, get_cfg, load_config

__all__ = [
    "add_common_config",
    "add_discovery_config",
    "add_unseg_config",
    "get_cfg",
    "load_config",
]
