"""What an embedding head that looks at pixels starts from."""

import logging

from detectron2.config import CfgNode
from torch import nn

from unseg.checkpoint import CheckpointError, load_weights_file
from unseg.modeling.roi_heads.region_encoders import CropEncoder

logger = logging.getLogger(__name__)


def load_crop_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Load MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS into the crops' network, if there is one.

    Args:
        model: to be trained. One that is trained holds this network's weights itself.
        cfg: the model's.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it does not hold a Detectron2 ResNet of CROP_DEPTH; the message names what
            is missing.
    """
    path = cfg.MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS
    encoders = [part for part in model.modules() if isinstance(part, CropEncoder)]
    if not path or not encoders:
        return
    content = load_weights_file(path)
    weights = content.get("model", content) if isinstance(content, dict) else content
    try:
        for encoder in encoders:
            encoder.load_resnet(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS {path} is no Detectron2 ResNet-"
            f"{cfg.MODEL.HIERARCHICAL_EMBEDDING.CROP_DEPTH} (python -m unseg.tools.convert_weights "
            f"torchvision): {error}"
        ) from error
    logger.info("crops are seen by the ResNet of %s", path)
