"""The filter bank: whitened groups, the kernel that the lift stands for, grids of any size."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from unseg.config import get_cfg
from unseg.modeling.backbone.filter_bank import FilterBank, _gaussian_blur, _whiten


def make(**changes):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.BACKBONE.NAME = "build_filter_bank_backbone"
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return build_backbone(cfg, ShapeSpec(channels=3))


def normalised(images, bank):
    return (images - bank.pixel_mean) / bank.pixel_std


def scene(h=64, w=96, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 255, (3, h, w))
    image[:, h // 4 : h // 2, w // 4 : w // 2] = np.array([200, 30, 60])[:, None, None]
    return torch.from_numpy(image).float()


@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("size", [(64, 96), (61, 99), (9, 40), (1, 1), (8, 3)])
def test_grid_covers_images_of_any_size(size, stride):
    bank = make(MODEL__FILTER_BANK__STRIDE=stride)
    output = bank(normalised(torch.rand(2, 3, *size) * 255, bank))["filter_bank"]
    h, w = (max(1, round(side / stride)) for side in size)
    assert output.shape == (2, 256, h, w)
    assert output.isfinite().all()
    assert bank.output_shape()["filter_bank"].channels == 256
    assert bank.output_shape()["filter_bank"].stride == stride


def test_images_of_a_batch_do_not_influence_each_other():
    bank = make()
    a, b = scene(seed=1), scene(seed=2)
    together = bank(normalised(torch.stack((a, b)), bank))["filter_bank"]
    for index, image in enumerate((a, b)):
        alone = bank(normalised(image[None], bank))["filter_bank"]
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-4)


def test_channel_order_does_not_matter():
    rgb, bgr = make(), make(INPUT__FORMAT="BGR")
    image = scene()[None]
    torch.testing.assert_close(
        rgb(normalised(image, rgb)), bgr((image.flip(1) - bgr.pixel_mean) / bgr.pixel_std)
    )


def test_whitening_is_the_damped_inverse_root():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 10, 12)) * np.array([5, 1, 0.2, 0.01])[:, None, None]
    x[1] += 0.5 * x[0]
    flat = x.reshape(4, -1) - x.reshape(4, -1).mean(1, keepdims=True)
    covariance = flat @ flat.T / flat.shape[1]
    # independent of how the eigenvectors come out: (C + d I)^(-1/2) by Newton's iteration
    damped = covariance + 0.05 * np.linalg.norm(covariance, 2) * np.eye(4)
    scale = np.trace(damped)
    y, z = damped / scale, np.eye(4)
    for _ in range(60):
        t = 0.5 * (3 * np.eye(4) - z @ y)
        y, z = y @ t, t @ z
    expected = (z / math.sqrt(scale)) @ flat / math.sqrt(4)
    found = _whiten(torch.from_numpy(x)[None], 0.05)[0].reshape(4, -1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_blur_keeps_constants_and_spreads_an_impulse_as_a_gaussian():
    torch.testing.assert_close(
        _gaussian_blur(torch.full((1, 2, 9, 7), 3.0), 2.0).mean().item(), 3.0
    )
    impulse = torch.zeros(1, 1, 25, 25, dtype=torch.float64)
    impulse[0, 0, 12, 12] = 1
    blurred = _gaussian_blur(impulse, 1.5)[0, 0]
    offsets = torch.arange(25) - 12.0
    variance = (blurred.sum(0) * offsets**2).sum()
    assert variance == pytest.approx(1.5**2, rel=0.03)
    torch.testing.assert_close(blurred, blurred.t())


def test_cosines_approach_the_gaussian_kernel():
    """With many channels, cosine = exp(-d^2 / 2 sigma^2) of the descriptors."""
    bank = make(MODEL__FILTER_BANK__CHANNELS=8192, MODEL__FILTER_BANK__BANDWIDTH=1.4)
    small = make(MODEL__FILTER_BANK__CHANNELS=64)
    image = normalised(scene()[None], bank)
    x = image * bank.pixel_std + bank.pixel_mean
    grid = (8, 12)
    groups = (bank._color(x, grid), bank._texture(x, grid), bank._position(x, grid))
    weights = (1.0, 0.3, 1.5)
    descriptor = torch.cat([w * g for w, g in zip(weights, groups, strict=True)], 1)[0].flatten(1)
    kernel = torch.exp(-(torch.cdist(descriptor.t(), descriptor.t()) ** 2) / (2 * 1.4**2))

    def error(b):
        f = torch.nn.functional.normalize(b(image)["filter_bank"][0].flatten(1), dim=0)
        return (f.t() @ f - kernel).abs().mean()

    assert error(bank) < 0.01
    assert error(small) > 2 * error(bank)


def test_gabor_filters_answer_to_their_own_wave():
    bank = make()
    yy, xx = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    responses = []
    for wavelength in (4.0, 8.0):
        for k in range(4):
            angle = math.pi * k / 4
            phase = 2 * math.pi / wavelength * (math.cos(angle) * xx + math.sin(angle) * yy)
            luma = (128 + 50 * torch.cos(phase + 0.7)).expand(3, 64, 64)
            radius = bank.gabor_row.shape[-1] // 2
            plane = torch.nn.functional.pad(luma[None, :1] - 128, (radius,) * 4, mode="replicate")
            rows = torch.nn.functional.conv2d(plane, bank.gabor_row)
            out = torch.nn.functional.conv2d(rows, bank.gabor_column, groups=8)
            energy = out.view(8, 2, 64, 64).norm(dim=1)[:, 20:44, 20:44].mean((1, 2))
            responses.append(energy)
    responses = torch.stack(responses)
    assert responses.argmax(1).tolist() == list(range(8))
    # a unit-sum envelope answers to its own wave with half the amplitude, everywhere
    torch.testing.assert_close(responses.diagonal(), torch.full((8,), 25.0), rtol=0.02, atol=0)


def test_objects_stand_out():
    """Cells inside a coherent patch are more alike than across its border."""
    bank = make()
    features = bank(normalised(scene(128, 192)[None], bank))["filter_bank"][0]
    f = torch.nn.functional.normalize(features, dim=0)
    center = f[:, 6, 9]
    similarity = torch.einsum("c,chw->hw", center, f)
    inside = similarity[5:7, 7:11].mean()
    around = torch.cat((similarity[2, 6:13], similarity[10, 6:13])).mean()
    assert inside > around + 0.3


def test_bad_settings():
    with pytest.raises(ValueError, match="even"):
        make(MODEL__FILTER_BANK__CHANNELS=33)
    with pytest.raises(ValueError, match="RGB or BGR"):
        make(INPUT__FORMAT="L")
    assert issubclass(FilterBank, torch.nn.Module)
