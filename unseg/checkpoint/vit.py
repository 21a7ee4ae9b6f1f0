"""DINO's vision transformers: timm builds them, their released weights are checked against that.

Caron et al., "Emerging properties in self-supervised vision transformers" (2021). The names and
shapes of timm's weights are those of DINO's own files, so nothing is renamed.

Legend: C channels, P patch side in pixels, g the grid's side in the weights (224 / P), h w patches.
"""

import logging
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from unseg.checkpoint.resnet import Weights, check_weights
from unseg.checkpoint.safe import CheckpointError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)

# (cfg.MODEL.VIT.ARCH, PATCH_SIZE) to timm's name, and the channels C that tell the sizes apart.
DINO_VITS = {
    ("vit_small", 16): "vit_small_patch16_224.dino",
    ("vit_small", 8): "vit_small_patch8_224.dino",
    ("vit_base", 16): "vit_base_patch16_224.dino",
    ("vit_base", 8): "vit_base_patch8_224.dino",
}
_ARCH_BY_CHANNELS = {384: "vit_small", 768: "vit_base"}

# Where DinoViT keeps timm's model: a name that no other part of a detector ends in.
VIT_PREFIX = "vit."


def create_dino_vit(arch: str, patch_size: int) -> "VisionTransformer":
    """timm's ViT of that size with random weights and no head; nothing is downloaded.

    Raises:
        ValueError: DINO has no such ViT.
    """
    if (arch, patch_size) not in DINO_VITS:
        known = ", ".join(f"{name} {side}" for name, side in DINO_VITS)
        raise ValueError(
            f"MODEL.VIT.ARCH {arch!r} with MODEL.VIT.PATCH_SIZE {patch_size!r} is none of: {known}"
        )
    # Here, because timm takes a tenth of the time of importing unseg and most models have no ViT.
    import timm

    name = DINO_VITS[arch, patch_size]
    return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)


def interpolate_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINO's position embedding for another grid; on its own grid it is returned as it is.

    DINO resamples bicubically, without antialiasing, by factors (h + 0.1) / g and (w + 0.1) / g.
    The 0.1 guards against rounding, but it also moves the sampling points: the result is neither
    timm's nor that of resizing to (h, w).

    Args:
        pos_embed: (1, 1 + g*g, C); the first row is the class token's.
        grid: (h, w).

    Returns:
        (1, 1 + h*w, C).
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if grid == (side, side):
        return pos_embed
    patches = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, C, g, g)
    factors = tuple((n + 0.1) / side for n in grid)
    patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def expected_vit(arch: str, patch_size: int) -> dict[str, torch.Size]:
    """Names and shapes of the weights of a DINO ViT, under their released names."""
    with torch.device("meta"):
        model = create_dino_vit(arch, patch_size)
    return {name: value.shape for name, value in model.state_dict().items()}


def _recognise(weights: Weights, path: str) -> tuple[str, int]:
    """ARCH and PATCH_SIZE of the ViT by the shape of its patch embedding (C, 3, P, P)."""
    name = "patch_embed.proj.weight"
    shape = tuple(weights[name].shape)
    arch = _ARCH_BY_CHANNELS.get(shape[0]) if len(shape) == 4 else None
    if (arch, shape[-1]) not in DINO_VITS:
        raise CheckpointError(
            f"{path}: a ViT whose {name} has shape {shape} is not known; there are "
            "384 or 768 channels and patches of 16 or 8 pixels"
        )
    return arch, shape[-1]


def _native_positions(weights: Weights, native: torch.Size, path: str) -> Weights:
    """The same weights with the positions of a 224-pixel image.

    Raises:
        CheckpointError: the positions are not those of a square grid.
    """
    pos_embed = weights.get("pos_embed")
    if pos_embed is None or pos_embed.shape == native:
        return weights
    shape = tuple(pos_embed.shape)
    if len(shape) != 3 or shape[1] < 2 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
        raise CheckpointError(
            f"{path}: pos_embed has shape {shape}: one class token and a square grid are needed, "
            f"as in {tuple(native)}"
        )
    side, other = math.isqrt(native[1] - 1), math.isqrt(shape[1] - 1)
    logger.warning(
        "%s: positions of %d x %d patches are resampled to the %d x %d of 224 pixels",
        path,
        other,
        other,
        side,
        side,
    )
    resampled = interpolate_positions(pos_embed.float(), (side, side)).to(pos_embed.dtype)
    return {**weights, "pos_embed": resampled}


def convert_vit(weights: Weights, path: str) -> Weights:
    """A DINO ViT's weights under the names of :class:`unseg.modeling.DinoViT`.

    Projection and classifier heads (``head.*``) are left out; anything else must match one of
    ViT-S/16, S/8, B/16, B/8 exactly. Positions of another image size than 224 are resampled as DINO
    does for a 224-pixel image.

    Args:
        weights: under DINO's names, which are also timm's, a patch embedding among them.
        path: the file, for messages.

    Raises:
        CheckpointError: no ViT of DINO has these weights; the message names the first differences.
    """
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    arch, patch_size = _recognise(weights, path)
    expected = expected_vit(arch, patch_size)
    weights = _native_positions(weights, expected["pos_embed"], path)
    check_weights(weights, expected, f"{path} is not a {arch} with patches of {patch_size} pixels")
    logger.info(
        "%s: %d weights for MODEL.VIT.ARCH %s, MODEL.VIT.PATCH_SIZE %d",
        path,
        len(weights),
        arch,
        patch_size,
    )
    return {f"{VIT_PREFIX}{name}": value for name, value in weights.items()}
