"""The strong view of an image: colour jitter, grayscale, blur and rectangles of noise.

The recipe of contrastive learning (SimCLR; random erasing: Zhong et al., 2017), which FreeSOLO uses
for the view that its losses see beside the weak one. Nothing moves, so masks and boxes of the weak
view hold for the strong one.

Legend: H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

_NODE = "MODEL.FREESOLO.DATA"


@dataclass(frozen=True)
class StrongViewSettings:
    """Strengths and probabilities; see unseg/config/freesolo.py.

    Raises:
        ValueError: a value is out of its range; the message names the config key.
    """

    color_jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1)
    color_jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: Sequence[float] = (0.1, 2.0)
    erasing: Sequence[Sequence[float]] = (
        (0.7, 0.05, 0.2, 0.3, 3.3),
        (0.5, 0.02, 0.2, 0.1, 6.0),
        (0.3, 0.02, 0.2, 0.05, 8.0),
    )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "StrongViewSettings":
        data = cfg.MODEL.FREESOLO.DATA
        return cls(**{name: data[name.upper()] for name in cls.__dataclass_fields__})

    def __post_init__(self) -> None:
        jitter, sigma = self.color_jitter, self.blur_sigma
        if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
            raise ValueError(
                f"{_NODE}.COLOR_JITTER: four numbers from 0 up, the hue at most 0.5, not {jitter}"
            )
        if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"{_NODE}.BLUR_SIGMA: 0 < least <= greatest, not {sigma}")
        for step in self.erasing:
            if len(step) != 5 or not (0 <= step[1] <= step[2] <= 1 and 0 < step[3] <= step[4]):
                raise ValueError(
                    f"{_NODE}.ERASING: (probability, least area, greatest area, least aspect "
                    f"ratio, greatest aspect ratio) each, areas from 0 to 1, not {step}"
                )
        probabilities = [
            ("COLOR_JITTER_PROB", self.color_jitter_prob),
            ("GRAYSCALE_PROB", self.grayscale_prob),
            ("BLUR_PROB", self.blur_prob),
            *(("ERASING", step[0]) for step in self.erasing),
        ]
        for key, value in probabilities:
            if not 0 <= value <= 1:
                raise ValueError(f"{_NODE}.{key}: {value} is not a probability")


def strong_view(image: Tensor, settings: StrongViewSettings, image_format: str = "RGB") -> Tensor:
    """Change the colours, blur, and cover some of an image, at random.

    All random numbers come from torch's global CPU generator.

    Args:
        image: (3, H, W) uint8 on the CPU, not changed.
        settings: what to do how often and how strongly.
        image_format: "RGB" or "BGR", order of the channels in `image` and in the result. Colours
            are changed alike in both.

    Returns:
        (3, H, W) uint8, in memory of its own.

    Raises:
        ValueError: the image is of another shape or type, or the format is neither.
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        raise ValueError(
            f"image must be a (3, H, W) uint8 tensor, not {image.dtype} {tuple(image.shape)}"
        )
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format must be RGB or BGR, got {image_format!r}")
    view = image.flip(0) if image_format == "BGR" else image.clone()
    if _happens(settings.color_jitter_prob):
        view = _jitter(view, settings.color_jitter)
    if _happens(settings.grayscale_prob):
        # A copy: the three channels are one in memory.
        view = F.rgb_to_grayscale(view, num_output_channels=3).contiguous()
    if _happens(settings.blur_prob):
        view = blur(view, _uniform(*settings.blur_sigma))
    for probability, *area_and_ratio in settings.erasing:
        if _happens(probability):
            _erase(view, area_and_ratio[:2], area_and_ratio[2:])
    return view.flip(0) if image_format == "BGR" else view


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _happens(probability: float) -> bool:
    # Drawn also for 0 and 1: switching a step off leaves the draws of later steps as they were.
    return float(torch.rand(())) < probability


def _jitter(image: Tensor, strengths: Sequence[float]) -> Tensor:
    """Brightness, contrast, saturation and hue of an RGB image, in random order.

    torchvision's ColorJitter, but for the hue.
    """
    ranges = v2.ColorJitter(*strengths)
    order, brightness, contrast, saturation, hue = ranges.get_params(
        ranges.brightness, ranges.contrast, ranges.saturation, ranges.hue
    )
    changes = (
        (F.adjust_brightness, brightness),
        (F.adjust_contrast, contrast),
        (F.adjust_saturation, saturation),
        (rotate_hue, hue),
    )
    for index in order.tolist():
        change, factor = changes[index]
        if factor is not None:  # a strength of 0
            image = change(image, factor)
    return image


def rotate_hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue of an image by a part of the circle, saturation and value kept.

    Within one grey level of torchvision's adjust_hue, and six times as fast: of all steps of the
    strong view, that one would take most of the time.

    Args:
        image: (3, H, W) uint8 RGB.
        turn: from -0.5 to 0.5.

    Returns:
        (3, H, W) uint8.
    """
    hsv = cv2.cvtColor(cv2.merge(image.numpy()).astype(np.float32), cv2.COLOR_RGB2HSV)
    hue = hsv[:, :, 0]  # degrees
    hue += 360 * turn
    hue[hue < 0] += 360
    hue[hue >= 360] -= 360
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).round().astype(np.uint8)
    return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of each channel, borders mirrored (the pixel at the border not repeated).

    By OpenCV, which cuts the kernel off at four sigma: several times as fast as torchvision's,
    whose kernel is not separated and has to be smaller than the image.

    Args:
        image: (C, H, W) uint8.
        sigma: standard deviation in pixels, greater than 0.

    Returns:
        (C, H, W) uint8.
    """
    # As float: of bytes, the kernel's weights would be multiples of 1/256.
    planes = [cv2.GaussianBlur(p, (0, 0), sigma) for p in image.numpy().astype(np.float32)]
    return torch.from_numpy(np.stack(planes).round().astype(np.uint8))


def _erase(image: Tensor, areas: Sequence[float], ratios: Sequence[float]) -> None:
    """Fill a random rectangle of an image (C, H, W) uint8 with noise, in place.

    The noise is uniform over all 256 values: torchvision's own is normal around 0, and of it bytes
    keep 0, 1 and 255. Like there, a rectangle that does not fit into the image after ten trials is
    left out.

    Args:
        image: is changed.
        areas: least and greatest part of the image's area.
        ratios: least and greatest height / width.
    """
    # `value` only keeps torchvision from drawing noise.
    top, left, height, width, _ = v2.RandomErasing.get_params(image, areas, ratios, value=[0.0])
    if (height, width) != tuple(image.shape[1:]):  # torchvision's way to say that none fits
        noise = torch.randint(0, 256, (len(image), height, width), dtype=torch.uint8)
        image[:, top : top + height, left : left + width] = noise
