"""From SOLO's predictions to instances (SOLOv2, section 3.3).

Legend: K grid cells of all levels, M candidates, E kernel channels, D embedding length, h w mask
pixels, H W pixels of the image file.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from unseg.layers import keep_decayed, matrix_nms

# Masks at the size of the image are made for as many objects at a time as fit this many floats.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class SoloInferenceSettings:
    """Constants of inference; see unseg/config/freesolo.py."""

    score_thr: float = 0.1
    nms_pre: int = 500
    mask_thr: float = 0.5
    nms_kernel: str = "gaussian"
    nms_sigma: float = 2.0
    update_thr: float = 0.05
    max_per_img: int = 100
    compat: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SoloInferenceSettings":
        solo = cfg.MODEL.FREESOLO
        return cls(**{name: solo[name.upper()] for name in cls.__dataclass_fields__})


def point_nms(scores: Tensor) -> Tensor:
    """Zero the scores that are not the maximum of the 2 x 2 window that ends in them.

    Args:
        scores: (B, classes, S, S) in [0, 1].
    """
    # The padding puts a row above and a column to the left; the surplus ones at the end go.
    peaks = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[:, :, :-1, :-1]
    return scores * (peaks == scores)


@dataclass(frozen=True)
class Candidates:
    """Cells whose score passed, before and after matrix NMS.

    Attributes:
        masks: (M, h, w) float probabilities.
        scores: (M,) confidence: category score times maskness, decayed after NMS.
        category_scores, maskness: (M,) float.
        classes: (M,) int64.
        embeddings: (M, D) float.
    """

    masks: Tensor
    scores: Tensor
    category_scores: Tensor
    maskness: Tensor
    classes: Tensor
    embeddings: Tensor

    def __getitem__(self, index: Tensor) -> "Candidates":
        return Candidates(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def find_candidates(
    scores: Tensor,
    kernels: Tensor,
    embeddings: Tensor,
    strides: Tensor,
    features: Tensor,
    settings: SoloInferenceSettings,
) -> Candidates:
    """The cells of one image whose category and mask pass, scored.

    Args:
        scores: (K, classes) category probabilities after :func:`point_nms`.
        kernels: (K, E).
        embeddings: (K, D).
        strides: (K,) of each cell's level: masks must have more pixels than that.
        features: (E, h, w) mask features.
        settings: thresholds.
    """
    cells, classes = (scores > settings.score_thr).nonzero(as_tuple=True)
    logits = (kernels[cells].float() @ features.float().flatten(1)).view(-1, *features.shape[1:])
    probabilities = logits.sigmoid()
    binary = probabilities > settings.mask_thr
    areas = binary.flatten(1).sum(1)
    maskness = (probabilities * binary).flatten(1).sum(1) / areas.clamp(min=1)
    category = scores[cells, classes].float()
    found = Candidates(
        probabilities, category * maskness, category, maskness, classes, embeddings[cells].float()
    )
    return found[areas > strides[cells]]


def suppress(found: Candidates, settings: SoloInferenceSettings) -> Candidates:
    """Matrix NMS per class on the best candidates, in falling order of the decayed scores."""
    order = found.scores.argsort(descending=True, stable=True)[: settings.nms_pre]
    found = found[order]
    decayed = matrix_nms(
        found.masks > settings.mask_thr,
        found.scores,
        found.classes,
        kernel=settings.nms_kernel,
        sigma=settings.nms_sigma,
    )
    keep = keep_decayed(decayed, settings.update_thr, settings.max_per_img)
    kept = found[keep]
    return Candidates(
        kept.masks,
        decayed[keep],
        kept.category_scores,
        kept.maskness,
        kept.classes,
        kept.embeddings,
    )


def upsampling_ratio(
    feature_size: tuple[int, int], input_size: tuple[int, int], stride: int, compat: bool
) -> int:
    """Pixels per mask pixel.

    The released code takes the larger quotient of the sides, rounded up, of the image without and
    the features with padding: less than the stride if much is padded, which misplaces the masks.
    """
    if not compat:
        return stride
    return max(math.ceil(a / b) for a, b in zip(input_size, feature_size, strict=True))


def masks_in_image(
    masks: Tensor, input_size: tuple[int, int], output_size: tuple[int, int], ratio: int, thr: float
) -> Tensor:
    """Binary masks at the size of the image file.

    Args:
        masks: (M, h, w) probabilities over the padded input.
        input_size: (height, width) of the input without padding.
        output_size: (H, W).
        ratio: pixels per mask pixel.
        thr: threshold of the probabilities.

    Returns:
        (M, H, W) bool.
    """
    if not len(masks):
        return masks.new_zeros((0, *output_size), dtype=torch.bool)
    pixels = max(output_size[0] * output_size[1], masks.shape[1] * masks.shape[2] * ratio**2)
    resized = []
    for chunk in masks.split(max(1, _CHUNK_ELEMENTS // pixels)):
        x = F.interpolate(chunk[None], scale_factor=ratio, mode="bilinear", align_corners=False)
        x = x[..., : input_size[0], : input_size[1]]
        if x.shape[-2:] != output_size:
            x = F.interpolate(x, size=output_size, mode="bilinear", align_corners=False)
        resized.append(x[0] > thr)
    return torch.cat(resized)


def mask_boxes(masks: Tensor, compat: bool) -> Tensor:
    """Boxes (M, 4) XYXY of masks (M, H, W) that are not empty.

    Tight: [x0, y0, x1 + 1, y1 + 1]. As in the released code: centre (mean of the occupied columns
    or rows) -/+ half of their number, which is half a pixel off and smaller if there are gaps.
    """
    low, high = [], []
    for dim in (1, 2):  # x, then y
        occupied = masks.any(dim=dim)
        n = occupied.shape[1]
        if compat:
            count = occupied.sum(1)
            position = torch.arange(n, dtype=torch.float32, device=masks.device)
            center = (occupied * position).sum(1) / count
            low.append(center - count / 2)
            high.append(center + count / 2)
        else:
            numbers = occupied.to(torch.uint8)
            low.append(numbers.argmax(1).float())
            high.append(n - numbers.flip(1).argmax(1).float())
    return torch.stack(low + high, dim=1)


def to_instances(
    found: Candidates,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    stride: int,
    settings: SoloInferenceSettings,
) -> Instances:
    """Instances at the size of the image file; objects that become empty there are dropped.

    Fields: pred_masks (N, H, W) bool, pred_boxes, scores, category_scores, maskness, pred_classes
    and pred_embeddings (N, D), of length 1.
    """
    ratio = upsampling_ratio(found.masks.shape[-2:], input_size, stride, settings.compat)
    masks = masks_in_image(found.masks, input_size, output_size, ratio, settings.mask_thr)
    kept = masks.flatten(1).any(dim=1)
    masks, found = masks[kept], found[kept]
    instances = Instances(output_size)
    instances.pred_masks = masks
    instances.pred_boxes = Boxes(mask_boxes(masks, settings.compat))
    instances.scores = found.scores
    instances.category_scores = found.category_scores
    instances.maskness = found.maskness
    instances.pred_classes = found.classes
    instances.pred_embeddings = F.normalize(found.embeddings, dim=1)
    return instances
