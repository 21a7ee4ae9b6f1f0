"""Reading image files of any kind as 8-bit RGB or BGR, with errors that name the file."""

import contextlib
from collections.abc import Iterator

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

# EXIF orientations 5 to 8 exchange width and height.
_EXIF_ORIENTATION = 274
_TRANSPOSED = (5, 6, 7, 8)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif")


class ImageReadError(OSError):
    """An image file is missing, damaged or not an image; the message names it."""


@contextlib.contextmanager
def _open(file_name: str) -> Iterator[Image.Image]:
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageReadError(f"{file_name}: cannot be read as an image: {error}") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray images, which Pillow would clip at 255 instead."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.max(initial=0) > 255:
        values = values // 257
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def read_image(file_name: str, image_format: str = "RGB") -> np.ndarray:
    """Read an image and apply its EXIF rotation.

    Gray, palette, CMYK and 16-bit images are converted; an alpha channel is dropped, as
    Detectron2 does.

    Args:
        file_name: anything Detectron2's PathManager opens.
        image_format: "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageReadError: the file cannot be read as an image; the message names it.
        ValueError: the format is neither "RGB" nor "BGR".
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT must be RGB or BGR, got {image_format!r}")
    with _open(file_name) as image:
        rgb = np.asarray(_to_8_bit(ImageOps.exif_transpose(image)).convert("RGB"))
    return rgb[:, :, ::-1] if image_format == "BGR" else rgb


def read_image_size(file_name: str) -> tuple[int, int]:
    """Height and width in pixels after the EXIF rotation, from the header alone.

    Raises:
        ImageReadError: the header cannot be read.
    """
    with _open(file_name) as image:
        width, height = image.size
        transposed = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
    return (width, height) if transposed else (height, width)
