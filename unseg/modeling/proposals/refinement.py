"""SharpMask's refinement: from a window's vector to a mask at full resolution, top down.

Pinheiro et al., "Learning to refine object segments" (ECCV 2016), sections 2 and 3; channels and
the horizontal path's width as released. A mask encoding M1 is doubled in size at each step, with
what a finer map of the trunk knows about edges added.

Legend: B images or patches, N windows, E size of the vectors, C channels of a trunk map, c side in
cells of a window on the coarsest map, S steps (n = 1 ... S), f = 2^(n-1), q = c f side of a window
at step n, k channels of the mask encoding at step n, h w cells of a map, m = c 2^S side of a mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# MODEL.SHARPMASK.PAD_MODE to torch's name for one cell: "symmetric" repeats the outermost one.
_PADDING = {"zeros": "zeros", "symmetric": "replicate", "port": "reflect"}
UPSAMPLING = ("nearest", "bilinear")


def _conv(before: int, after: int, pad_mode: str) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel_size=3, padding=1, padding_mode=_PADDING[pad_mode])


def step_widths(km: int, steps: int) -> list[int]:
    """Channels k of the mask encoding at each step: `km`, then half as many each time.

    Raises:
        ValueError: not all of them are even and at least 2; the message names the config's key.
    """
    widths = [km / 2**n for n in range(steps)]
    if any(k < 2 or k % 2 for k in widths):
        raise ValueError(
            f"MODEL.SHARPMASK.KM must be a positive multiple of {2**steps}, so that it can be "
            f"halved at each of {steps} steps: {km}"
        )
    return [int(k) for k in widths]


class RefinementStep(nn.Module):
    """One refinement module: adds a trunk map to a mask encoding and doubles its size.

    Two paths end in k / 2 channels each and are added, which is the paper's concatenation followed
    by a convolution.
    """

    def __init__(self, in_channels: int, hidden: int, width: int, upsample: str, pad_mode: str):
        """
        Args:
            in_channels: C of the trunk map.
            hidden: channels of the horizontal path's first convolution.
            width: k.
            upsample: "nearest" or "bilinear" (half-pixel centres).
            pad_mode: as MODEL.SHARPMASK.PAD_MODE.
        """
        super().__init__()
        self.horizontal = nn.Sequential(
            _conv(in_channels, hidden, pad_mode),
            nn.ReLU(inplace=True),
            _conv(hidden, width, pad_mode),
            nn.ReLU(inplace=True),
            _conv(width, width // 2, pad_mode),
        )
        self.vertical = nn.Sequential(
            _conv(width, width, pad_mode),
            nn.ReLU(inplace=True),
            _conv(width, width // 2, pad_mode),
        )
        self.upsample = nn.Upsample(
            scale_factor=2,
            mode=upsample,
            align_corners=False if upsample == "bilinear" else None,
        )

    def forward(self, encoding: Tensor, lateral: Tensor) -> Tensor:
        """
        Args:
            encoding: (N, k, q, q).
            lateral: (N, k/2, q, q), what `horizontal` made of the trunk map in the same windows.

        Returns:
            (N, k/2, 2q, 2q).
        """
        return self.upsample(F.relu(self.vertical(encoding) + lateral))


class Refinement(nn.Module):
    """The whole top-down path: :meth:`laterals` once per batch, :meth:`windows` for chosen ones.

    It runs in the same way on whole images and on training patches, which are images with one
    window, in the middle. Their context is cut off after the horizontal paths: these reach three
    cells beyond the window, and see the same there, where the context is wide enough, as in an
    image. (The release cuts it off before: they see padding in training and the window's
    neighbours in images.) The vertical path pads at the window's border in both.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        cells: int,
        in_channels: Sequence[int],
        km: int = 32,
        ks: int = 64,
        upsample: str = "nearest",
        pad_mode: str = "symmetric",
        chunk: int = 128,
    ):
        """
        Args:
            embed_dim: E.
            cells: c.
            in_channels: C of the trunk maps from coarse to fine, each with half the stride of the
                one before; their number is S.
            km: channels of M1, a multiple of 2^S.
            ks: channels of the horizontal paths' first convolutions; half as many at the last step
                (as released).
            upsample: "nearest" (released) or "bilinear" (paper).
            pad_mode: "zeros", "symmetric" (released in Lua) or "port" (reflect).
            chunk: windows that are refined at a time.

        Raises:
            ValueError: one of them has no such value; the message names the config's key.
        """
        super().__init__()
        if not in_channels:
            raise ValueError("MODEL.SHARPMASK.IN_FEATURES must name at least one map")
        if ks < 2 or ks % 2:
            raise ValueError(f"MODEL.SHARPMASK.KS must be even and at least 2: {ks}")
        if upsample not in UPSAMPLING:
            raise ValueError(f"MODEL.SHARPMASK.UPSAMPLE must be one of {UPSAMPLING}: {upsample!r}")
        if pad_mode not in _PADDING:
            raise ValueError(
                f"MODEL.SHARPMASK.PAD_MODE must be one of {tuple(_PADDING)}: {pad_mode!r}"
            )
        widths = step_widths(km, len(in_channels))
        self.cells, self.km, self.chunk = cells, km, chunk
        self.encode = nn.Linear(embed_dim, km * cells**2)
        hidden = [ks] * (len(in_channels) - 1) + [ks // 2]
        self.steps = nn.ModuleList(
            RefinementStep(before, inner, width, upsample, pad_mode)
            for before, inner, width in zip(in_channels, hidden, widths, strict=True)
        )
        self.predict = _conv(widths[-1] // 2, 1, pad_mode)

    @property
    def out_size(self) -> int:
        """Side m of the masks."""
        return self.cells * 2 ** len(self.steps)

    def _refine(self, vectors: Tensor, laterals: Sequence[Tensor]) -> Tensor:
        """Vectors (N, E) and laterals (N, k/2, q, q) per step to logits (N, m, m)."""
        encoding = self.encode(vectors).unflatten(1, (self.km, self.cells, self.cells))
        for step, lateral in zip(self.steps, laterals, strict=True):
            encoding = step(encoding, lateral)
        return self.predict(encoding)[:, 0]

    def laterals(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What the horizontal paths make of the trunk's maps.

        Args:
            maps: per step (B, C, h, w), each next one with twice the cells of the one before.

        Returns:
            per step (B, k/2, h, w).

        Raises:
            ValueError: the sizes are others; where an image ends within a coarse cell, finer maps
                lack a part of the last windows.
        """
        sizes = [tuple(features.shape[-2:]) for features in maps]
        height, width = sizes[0]
        if sizes != [(height * 2**n, width * 2**n) for n in range(len(self.steps))]:
            raise ValueError(
                f"{len(self.steps)} trunk maps are needed, each with twice the cells of the one "
                f"before: {sizes}"
            )
        return [step.horizontal(x) for step, x in zip(self.steps, maps, strict=True)]

    def windows(self, vectors: Tensor, laterals: Sequence[Tensor], locations: Tensor) -> Tensor:
        """Masks of windows.

        Args:
            vectors: (N, E).
            laterals: from :meth:`laterals`.
            locations: int64 (N, 3): image, row and column of the window's first cell on the
                coarsest map.

        Returns:
            (N, m, m) logits.
        """
        views = []
        for n, lateral in enumerate(laterals):
            side, factor = self.cells * 2**n, 2**n
            view = lateral.unfold(2, side, factor).unfold(3, side, factor)
            views.append(view.permute(0, 2, 3, 1, 4, 5))  # (B, rows, columns, k/2, q, q), no copy
        masks = [
            self._refine(part, [view[tuple(places.T)] for view in views])
            for part, places in zip(
                vectors.split(self.chunk), locations.split(self.chunk), strict=True
            )
        ]
        return torch.cat(masks)
