"""Colour conversion against scikit-image."""

import numpy as np
import pytest
import torch

from unseg.layers.color import rgb_to_lab


def test_equals_scikit_image():
    color = pytest.importorskip("skimage.color")
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (2, 3, 17, 23))
    rgb[0, :, 0, :3] = np.array([[0, 255, 10]] * 3)  # black, white, dark gray
    lab = rgb_to_lab(torch.from_numpy(rgb).double())
    expected = color.rgb2lab(rgb.transpose(0, 2, 3, 1) / 255).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(lab.numpy(), expected, atol=1e-6)
    single = rgb_to_lab(torch.from_numpy(rgb).float())
    np.testing.assert_allclose(single.numpy(), expected, atol=5e-4)


def test_gradient_is_finite_everywhere():
    rgb = torch.tensor([0.0, 1.0, 255.0]).view(3, 1, 1).expand(3, 1, 4).clone().requires_grad_()
    rgb_to_lab(rgb).sum().backward()
    assert rgb.grad.isfinite().all()


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, H, W\)"):
        rgb_to_lab(torch.zeros(2, 4, 5, 5))
