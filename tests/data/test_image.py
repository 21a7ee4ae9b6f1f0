"""Every kind of image file is read as 8-bit colour, or refused by name."""

import io

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image

from unseg.data.image import ImageReadError, read_image, read_image_size

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 11, 3), dtype=np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("mode", "name"),
    [(None, "a.png"), ("L", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.tiff"),
     ("1", "a.png"), ("LA", "a.png"), (None, "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.gif")],
)  # fmt: skip
def test_equals_detectron2_where_it_can_read(tmp_path, mode, name, image_format):
    path = save(tmp_path / name, RGB, mode)
    image = read_image(path, image_format)
    assert image.dtype == np.uint8
    assert image.shape == RGB.shape
    np.testing.assert_array_equal(image, detectron2_read_image(path, image_format))
    assert read_image_size(path) == RGB.shape[:2]


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_gray_is_scaled(tmp_path, name):
    values = np.array([[0, 256, 32767, 65535], [257, 514, 1000, 40000]], dtype=np.uint16)
    path = save(tmp_path / name, values)
    expected = (values.astype(int) // 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / "a.png", RGB, exif=exif)
    image = read_image(path)
    np.testing.assert_array_equal(image, detectron2_read_image(path, "RGB"))
    assert read_image_size(path) == image.shape[:2] == ((7, 11) if orientation < 5 else (11, 7))


def test_one_pixel(tmp_path):
    path = save(tmp_path / "a.png", RGB[:1, :1])
    np.testing.assert_array_equal(read_image(path), RGB[:1, :1])


def jpeg_bytes():
    buffer = io.BytesIO()
    Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8))).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        jpeg_bytes()[: len(jpeg_bytes()) // 2],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 20,
    ],
    ids=["empty", "text", "truncated", "broken-header"],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match=r"bad\.jpg: cannot be read"):
        read_image(str(path))


def test_missing_files_are_named(tmp_path):
    for function in (read_image, read_image_size):
        with pytest.raises(ImageReadError, match=r"none\.jpg"):
            function(str(tmp_path / "none.jpg"))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageReadError, match=r"bomb\.png"):
        read_image(path)


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="YUV"):
        read_image(save(tmp_path / "a.png", RGB), "YUV")
