"""Dense features without weights: colour, texture and position under a random Fourier lift.

A way to run discovery on any photograph with nothing downloaded, not a substitute for DINO or
DenseCL features. The lift (Rahimi and Recht, "Random features for large-scale kernel machines",
2007) turns distances d between whitened descriptors into cosines close to exp(-d^2 / 2 sigma^2), so
that similarity falls to nothing away from an object instead of fading slowly.

Legend: B images, C channels, H W image pixels, h w feature cells, F filters.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from unseg.layers.color import rgb_to_lab

_LIFT_SEED = 0
# Gaussian envelope of a Gabor filter in wavelengths: about one octave of bandwidth.
_ENVELOPE = 0.56


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (B, C, h, w) with replicated borders."""
    radius = math.ceil(3 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    planes = x.flatten(0, 1).unsqueeze(1)  # (B*C, 1, h, w)
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="replicate"), kernel)
    kernel = kernel.transpose(2, 3)
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode="replicate"), kernel)
    return planes.view_as(x)


def _whiten(x: Tensor, damping: float) -> Tensor:
    """Decorrelate the channels of each image (B, C, h, w); total variance about 1.

    The symmetric (ZCA) root is used because it does not depend on the signs and order that an
    eigensolver happens to choose. Computed in float64: the eigenvalues differ by orders.
    """
    flat = x.flatten(2).double()
    flat = flat - flat.mean(dim=2, keepdim=True)
    covariance = flat @ flat.transpose(1, 2) / flat.shape[2]
    values, vectors = torch.linalg.eigh(covariance)
    # A constant image has no variance at all: leave its zeros as they are.
    scale = (values + damping * values[:, -1:]).clamp(min=1e-6).rsqrt()
    root = vectors @ (scale.unsqueeze(2) * vectors.transpose(1, 2))
    return (root @ flat / math.sqrt(x.shape[1])).to(x.dtype).view_as(x)


class FilterBank(Backbone):
    """Hand-made dense features, one output ``filter_bank`` (B, CHANNELS, h, w).

    The grid covers the image exactly: h = round(H / stride), w = round(W / stride), at least 1.
    All images of a batch must have one size (nothing may be padded: each image is whitened over
    its own pixels).
    """

    @configurable
    def __init__(
        self,
        *,
        stride: int,
        wavelengths: Sequence[float],
        orientations: int,
        color_weight: float,
        texture_weight: float,
        position_weight: float,
        damping: float,
        channels: int,
        bandwidth: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channel_order: str = "RGB",
    ):
        """
        Args:
            stride: pixels per cell.
            wavelengths, orientations: the Gabor filters, wavelengths in pixels.
            color_weight, texture_weight, position_weight: factors of the whitened groups.
            damping: fraction of the largest eigenvalue that whitening adds to all.
            channels: output channels of the lift, even.
            bandwidth: sigma of the kernel that the lift approximates.
            pixel_mean, pixel_std: the model's normalisation, undone here (colour needs 0-255).
            channel_order: "RGB" or "BGR", the order of the input channels.
        """
        super().__init__()
        if channel_order not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT must be RGB or BGR for the filter bank: {channel_order}"
            )
        if channels % 2:
            raise ValueError(f"FILTER_BANK.CHANNELS must be even, got {channels}")
        self.grid_stride = stride
        self.num_filters = len(wavelengths) * orientations
        self.weights = (color_weight, texture_weight, position_weight)
        self.damping = damping
        self.channels = channels
        self.flip_channels = channel_order == "BGR"
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            tensor = torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        row, column = self._gabor_kernels(wavelengths, orientations)
        self.register_buffer("gabor_row", row, persistent=False)
        self.register_buffer("gabor_column", column, persistent=False)
        # numpy's generator, because its stream is the same in every torch version.
        descriptor = 6 + self.num_filters + 2
        normal = np.random.default_rng(_LIFT_SEED).standard_normal((channels // 2, descriptor))
        lift = torch.from_numpy(normal / bandwidth).float()
        self.register_buffer("lift", lift, persistent=False)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec | None = None) -> dict:
        bank = cfg.MODEL.FILTER_BANK
        return {
            "stride": bank.STRIDE,
            "wavelengths": bank.WAVELENGTHS,
            "orientations": bank.ORIENTATIONS,
            "color_weight": bank.COLOR_WEIGHT,
            "texture_weight": bank.TEXTURE_WEIGHT,
            "position_weight": bank.POSITION_WEIGHT,
            "damping": bank.DAMPING,
            "channels": bank.CHANNELS,
            "bandwidth": bank.BANDWIDTH,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "channel_order": cfg.INPUT.FORMAT,
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"filter_bank": ShapeSpec(channels=self.channels, stride=self.grid_stride)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (B, 3, H, W) normalised images, not padded.
        """
        x = x.float() * self.pixel_std + self.pixel_mean
        if self.flip_channels:
            x = x.flip(1)
        grid = tuple(max(1, round(side / self.grid_stride)) for side in x.shape[-2:])
        color, texture, position = (
            weight * group
            for weight, group in zip(
                self.weights,
                (self._color(x, grid), self._texture(x, grid), self._position(x, grid)),
                strict=True,
            )
        )
        descriptor = torch.cat((color, texture, position), dim=1)
        phase = torch.einsum("fc,bchw->bfhw", self.lift, descriptor)
        return {"filter_bank": torch.cat((phase.cos(), phase.sin()), dim=1)}

    def _color(self, rgb: Tensor, grid: tuple[int, int]) -> Tensor:
        """Whitened L*a*b* of the cells and of their neighbourhood, (B, 6, h, w)."""
        lab = F.adaptive_avg_pool2d(rgb_to_lab(rgb.clamp(0, 255)), grid)
        return _whiten(torch.cat((lab, _gaussian_blur(lab, 2.0)), dim=1), self.damping)

    def _texture(self, rgb: Tensor, grid: tuple[int, int]) -> Tensor:
        """Whitened log Gabor energies, (B, F, h, w)."""
        luma = (rgb * rgb.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
        # The filters still pass 0.2 % of a constant: take most of it away beforehand.
        luma = luma - luma.mean(dim=(2, 3), keepdim=True)
        radius = self.gabor_row.shape[-1] // 2
        padded = F.pad(luma, (radius,) * 4, mode="replicate")
        rows = F.conv2d(padded, self.gabor_row)  # (B, 2F, H+2r, W): real, imaginary per filter
        response = F.conv2d(rows, self.gabor_column, groups=self.num_filters)
        real, imaginary = response[:, 0::2], response[:, 1::2]
        energy = (real.square() + imaginary.square()).sqrt()  # vector norms are 20 times slower
        energy = F.adaptive_avg_pool2d(energy, grid).log1p()
        return _whiten(_gaussian_blur(energy, 1.0), self.damping)

    @staticmethod
    def _position(rgb: Tensor, grid: tuple[int, int]) -> Tensor:
        """Coordinates of the cell centres in (-1, 1), x first, (B, 2, h, w)."""
        y, x = ((2 * torch.arange(n, device=rgb.device, dtype=rgb.dtype) + 1) / n - 1 for n in grid)
        x, y = torch.meshgrid(x, y, indexing="xy")
        return torch.stack((x, y)).expand(len(rgb), 2, *grid)

    @staticmethod
    def _gabor_kernels(wavelengths: Sequence[float], orientations: int) -> tuple[Tensor, Tensor]:
        """Separable complex Gabor filters: rows (2F, 1, 1, K), then columns (2F, 2, K, 1).

        With a round envelope, exp(i(u x + v y)) g(x) g(y) is the product of two one-dimensional
        complex kernels: 4 K taps a pixel instead of 2 K^2.
        """
        radius = math.ceil(2.5 * _ENVELOPE * max(wavelengths))
        steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
        rows, columns = [], []
        for wavelength in wavelengths:
            envelope = torch.exp(-0.5 * (steps / (_ENVELOPE * wavelength)) ** 2)
            envelope = envelope / envelope.sum()
            for k in range(orientations):
                angle = math.pi * k / orientations
                u, v = (2 * math.pi / wavelength * f(angle) for f in (math.cos, math.sin))
                rows += [envelope * torch.cos(u * steps), envelope * torch.sin(u * steps)]
                real, imaginary = envelope * torch.cos(v * steps), envelope * torch.sin(v * steps)
                columns += [torch.stack((real, -imaginary)), torch.stack((imaginary, real))]
        row = torch.stack(rows).view(len(rows), 1, 1, -1)
        column = torch.stack(columns).unsqueeze(-1)
        return row.float(), column.float()


@BACKBONE_REGISTRY.register()
def build_filter_bank_backbone(cfg, input_shape: ShapeSpec | None = None) -> FilterBank:
    """The filter bank of ``cfg.MODEL.FILTER_BANK``."""
    return FilterBank(cfg, input_shape)
