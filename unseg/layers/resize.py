"""One way to resize images, for training patches and for test pyramids: they must agree."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width of an image resized by `factor`: rounded, at least 1."""
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resampling with half-pixel centres.

    Args:
        image: (C, H, W) of any real dtype, H and W at least 1.
        size: height and width of the result, at least 1.

    Returns:
        float32 (C, *size); the image itself, as float32, if it has that size.
    """
    image = image.to(torch.float32)
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
