"""Build a config: Detectron2's defaults, `unseg`'s keys, a YAML file, command-line overrides."""

import logging
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from unseg.config.common import add_common_config
from unseg.config.deep_spectral import add_deep_spectral_config
from unseg.config.deepmask import add_deepmask_config
from unseg.config.discovery import add_discovery_config
from unseg.config.exemplar import add_exemplar_config
from unseg.config.freesolo import add_freesolo_config
from unseg.config.hierarchical_embedding import add_hierarchical_embedding_config
from unseg.config.instance_fcn import add_instance_fcn_config
from unseg.config.self_training import add_self_training_config
from unseg.config.vgg import add_vgg_config
from unseg.config.vit import add_vit_config

logger = logging.getLogger(__name__)


def add_unseg_config(cfg: CfgNode) -> None:
    """Add every key of `unseg` to `cfg` (in place; a second call changes nothing).

    Args:
        cfg: a node from ``detectron2.config.get_cfg()``. Detectron2's global defaults stay as
            they are.
    """
    if "DISCOVERY" in cfg:
        return
    add_common_config(cfg)
    add_discovery_config(cfg)
    add_freesolo_config(cfg)
    add_exemplar_config(cfg)
    add_deep_spectral_config(cfg)
    add_deepmask_config(cfg)
    add_instance_fcn_config(cfg)
    add_hierarchical_embedding_config(cfg)
    add_self_training_config(cfg)
    add_vgg_config(cfg)
    add_vit_config(cfg)


def get_cfg() -> CfgNode:
    """Detectron2's default config with the keys of `unseg`."""
    cfg = get_detectron2_cfg()
    add_unseg_config(cfg)
    return cfg


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """The frozen config of a YAML file and ``KEY VALUE`` overrides.

    The file is read without executing Python from it (``!!python/...`` tags are refused), which
    Detectron2's own ``merge_from_file`` allows by default. Without a GPU, ``MODEL.DEVICE`` becomes
    "cpu".

    Raises:
        yaml.constructor.ConstructorError: the YAML asks for a Python object.
        KeyError: the file names a key that does not exist.
        AssertionError: an override does, or has no value.
    """
    cfg = get_cfg()
    if config_file:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    cfg.merge_from_list(list(opts))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("CUDA is not available: MODEL.DEVICE is cpu instead of %s", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg
