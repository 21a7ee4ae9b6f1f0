"""Heads of DeepMask: from a trunk's map, a score for every window and masks for chosen ones.

Sources: Pinheiro et al., "Learning to segment object candidates" (NeurIPS 2015), section 3.2, for
"paper" and "full"; "Learning to refine object segments" (ECCV 2016) and its released code for
"shared". Everything that slides is written as a convolution; the window at (row, column) is the
`cells` x `cells` square of the map that begins there.

Legend: B images, C channels of the trunk, h w cells of its map, k cells per side of a window,
h' = h - k + 1 and w' = w - k + 1 windows, N chosen windows, m mask pixels per side, E embedding.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

# Windows are cut out of the map for so many bytes at a time.
_CHUNK_BYTES = 64 << 20


def cut_windows(features: Tensor, locations: Tensor, cells: int) -> Tensor:
    """(N, C, k, k): the windows of a map (B, C, h, w) at `locations`, int64 (N, 3) of image, row
    and column."""
    image, row, column = locations.unbind(1)
    offsets = torch.arange(cells, device=features.device)
    rows = (row[:, None] + offsets)[:, :, None]
    columns = (column[:, None] + offsets)[:, None, :]
    # The gradient goes back into the map itself, not into a copy per window.
    return features.permute(0, 2, 3, 1)[image[:, None, None], rows, columns].permute(0, 3, 1, 2)


def convolve_at(features: Tensor, locations: Tensor, conv: nn.Conv2d) -> Tensor:
    """The values (N, out channels) of a "valid" convolution at `locations` only.

    The same numbers as ``conv(features)`` there, up to the order of summation. Windows are cut out
    a few at a time.

    Args:
        features: (B, C, h, w).
        locations: int64 (N, 3) of image, row and column; N may be 0.
        conv: square kernel, stride 1, no padding, dilation or groups.
    """
    cells = conv.kernel_size[0]
    per_window = max(1, features.shape[1] * cells * cells * features.element_size())
    weight = conv.weight.flatten(1)
    parts = [
        F.linear(cut_windows(features, part, cells).flatten(1), weight, conv.bias)
        for part in locations.split(max(1, _CHUNK_BYTES // per_window))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class HeadSizes:
    """Of a head's layers; see :class:`DeepMaskHead`."""

    in_channels: int
    cells: int
    out_size: int
    embed_dim: int
    reduce_dim: int
    score_hidden: int
    dropout: float

    def __post_init__(self) -> None:
        sizes = {
            "in_channels": self.in_channels,
            "cells (INPUT_SIZE / stride)": self.cells,
            "OUT_SIZE": self.out_size,
            "EMBED_DIM": self.embed_dim,
            "REDUCE_DIM": self.reduce_dim,
            "SCORE_HIDDEN": self.score_hidden,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"DeepMask's head: {name} must be positive, got {size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"MODEL.DEEPMASK.DROPOUT must be in [0, 1), got {self.dropout}")


class ScoreLayers(nn.Module):
    """Dropout, 1x1 convolution, ReLU and the same again, without a ReLU: (B, E, h', w') to
    (B, 1, h', w')."""

    def __init__(self, embed_dim: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Conv2d(embed_dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.relu(self.fc1(self.dropout(x)))))


class PooledScoreLayers(ScoreLayers):
    """The paper's score branch, on the trunk's map (B, C, h, w).

    On a window it is a 2x2 max pool of stride 2 and a linear layer on k/2 x k/2 cells. For all
    windows at once: the pool with stride 1, and the same weights with dilation 2.
    """

    def __init__(self, sizes: HeadSizes):
        super().__init__(sizes.embed_dim, sizes.score_hidden, sizes.dropout)
        self.embed = nn.Conv2d(sizes.in_channels, sizes.embed_dim, sizes.cells // 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(self.embed(F.max_pool2d(x, 2, stride=1))))


class DeepMaskHead(nn.Module):
    """What the three heads have in common.

    Attributes:
        cells, out_size: of a window and of its mask.
    """

    #: The config's name of the head.
    kind = ""

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        cells: int,
        out_size: int = 56,
        embed_dim: int = 512,
        reduce_dim: int = 128,
        score_hidden: int = 1024,
        dropout: float = 0.5,
    ):
        """
        Args:
            in_channels: C.
            cells: k, the patch's side over the trunk's stride.
            out_size: m.
            embed_dim: E, of the vector that the mask is made of ("shared", "paper") and of that
                which the score is made of; "shared" has one for both.
            reduce_dim: channels after the 1x1 convolution on the trunk's map; "full" has none.
            score_hidden: of the score's hidden layer.
            dropout: before both layers of the score.

        Raises:
            ValueError: a size is not positive, `dropout` is not in [0, 1), or `cells` is odd where
                the score's pool halves it.
        """
        super().__init__()
        self.cells = cells
        self.out_size = out_size
        self._build(
            HeadSizes(in_channels, cells, out_size, embed_dim, reduce_dim, score_hidden, dropout)
        )
        self._init_weights()

    def _build(self, sizes: HeadSizes) -> None:
        """Make the layers `mask` and `score`, and what they need besides."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, cfg: CfgNode, *, in_channels: int, cells: int) -> dict[str, Any]:
        node = cfg.MODEL.DEEPMASK
        return {
            "in_channels": in_channels,
            "cells": cells,
            "out_size": node.OUT_SIZE,
            "embed_dim": node.EMBED_DIM,
            "reduce_dim": node.REDUCE_DIM,
            "score_hidden": node.SCORE_HIDDEN,
            "dropout": node.DROPOUT,
        }

    def _init_weights(self) -> None:
        """He's normal; the two last layers small, so that training begins near probability 1/2."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight_init.c2_msra_fill(module)
        for last in (self.mask, self.score.fc2):
            nn.init.normal_(last.weight, std=0.2 / last.weight[0].numel() ** 0.5)

    def mask_branch(self) -> list[nn.Module]:
        """The layers that serve the mask alone."""
        raise NotImplementedError

    def score_branch(self) -> list[nn.Module]:
        """The layers that serve the score alone."""
        return [self.score]

    def encode(self, features: Tensor) -> Any:
        """What :meth:`scores` and :meth:`masks` read, from the trunk's map (B, C, h, w)."""
        raise NotImplementedError

    def scores(self, encoded: Any) -> Tensor:
        """Logits (B, h', w') of all windows."""
        raise NotImplementedError

    def masks(self, encoded: Any, locations: Tensor) -> Tensor:
        """Logits (N, m, m) of the windows at `locations`, int64 (N, 3) of image, row, column.

        For N = 0 the result is empty, and its sum is still connected to all weights of the branch.
        """
        raise NotImplementedError

    def _as_masks(self, logits: Tensor) -> Tensor:
        return logits.view(len(logits), self.out_size, self.out_size)


class SharedHead(DeepMaskHead):
    """The released head: one vector per window, which both branches read."""

    kind = "shared"

    def _build(self, sizes: HeadSizes) -> None:
        self.reduce = nn.Conv2d(sizes.in_channels, sizes.reduce_dim, 1)
        self.embed = nn.Conv2d(sizes.reduce_dim, sizes.embed_dim, sizes.cells)
        self.mask = nn.Conv2d(sizes.embed_dim, sizes.out_size**2, 1)
        self.score = ScoreLayers(sizes.embed_dim, sizes.score_hidden, sizes.dropout)

    def mask_branch(self) -> list[nn.Module]:
        return [self.mask]

    def encode(self, features: Tensor) -> Tensor:
        """(B, E, h', w')."""
        return self.embed(F.relu(self.reduce(features)))

    def scores(self, encoded: Tensor) -> Tensor:
        return self.score(encoded)[:, 0]

    def masks(self, encoded: Tensor, locations: Tensor) -> Tensor:
        return self._as_masks(convolve_at(encoded, locations, self.mask))


class TrunkMaps(NamedTuple):
    """The trunk's map (B, C, h, w), and what the mask branch makes of each of its cells."""

    features: Tensor
    reduced: Tensor


class PaperHead(DeepMaskHead):
    """The paper's head: two branches on the trunk's map, the mask's weights of low rank."""

    kind = "paper"

    def _build(self, sizes: HeadSizes) -> None:
        _check_even(sizes.cells)
        self.reduce = nn.Conv2d(sizes.in_channels, sizes.reduce_dim, 1)
        self.embed = nn.Conv2d(sizes.reduce_dim, sizes.embed_dim, sizes.cells)
        self.mask = nn.Conv2d(sizes.embed_dim, sizes.out_size**2, 1)
        self.score = PooledScoreLayers(sizes)

    def mask_branch(self) -> list[nn.Module]:
        return [self.reduce, self.embed, self.mask]

    def encode(self, features: Tensor) -> TrunkMaps:
        return TrunkMaps(features, F.relu(self.reduce(features)))

    def scores(self, encoded: TrunkMaps) -> Tensor:
        return self.score(encoded.features)[:, 0]

    def masks(self, encoded: TrunkMaps, locations: Tensor) -> Tensor:
        # Nothing between these two layers: their product has the rank of the embedding.
        vectors = convolve_at(encoded.reduced, locations, self.embed)
        return self._as_masks(F.linear(vectors, self.mask.weight.flatten(1), self.mask.bias))


class FullHead(DeepMaskHead):
    """DeepMaskFull: as "paper", but each mask pixel is linear in the window's whole trunk map."""

    kind = "full"

    def _build(self, sizes: HeadSizes) -> None:
        _check_even(sizes.cells)
        self.mask = nn.Conv2d(sizes.in_channels, sizes.out_size**2, sizes.cells)
        self.score = PooledScoreLayers(sizes)

    def mask_branch(self) -> list[nn.Module]:
        return [self.mask]

    def encode(self, features: Tensor) -> Tensor:
        return features

    def scores(self, encoded: Tensor) -> Tensor:
        return self.score(encoded)[:, 0]

    def masks(self, encoded: Tensor, locations: Tensor) -> Tensor:
        return self._as_masks(convolve_at(encoded, locations, self.mask))


def _check_even(cells: int) -> None:
    if cells % 2:
        raise ValueError(
            "MODEL.DEEPMASK.INPUT_SIZE must be an even multiple of the trunk's stride for the "
            f"heads 'paper' and 'full', whose score branch halves it: {cells} cells"
        )


HEADS: dict[str, type[DeepMaskHead]] = {x.kind: x for x in (SharedHead, PaperHead, FullHead)}


def build_deepmask_head(cfg: CfgNode, *, in_channels: int, cells: int) -> DeepMaskHead:
    """The head that ``MODEL.DEEPMASK.HEAD`` names.

    Raises:
        ValueError: there is no such head, or a size does not fit it.
    """
    kind = cfg.MODEL.DEEPMASK.HEAD
    if kind not in HEADS:
        raise ValueError(f"MODEL.DEEPMASK.HEAD must be one of {', '.join(HEADS)}: {kind!r}")
    return HEADS[kind](cfg, in_channels=in_channels, cells=cells)
