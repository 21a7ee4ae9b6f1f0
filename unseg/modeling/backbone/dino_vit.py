"""DINO's vision transformer as a dense backbone that stops inside the block it is asked for.

Caron et al., "Emerging properties in self-supervised vision transformers" (2021); the keys of the
last block are the features of the spectral methods (Melas-Kyriazi et al., "Deep spectral methods",
2022). timm provides the transformer.

Legend: B images, C channels, H W image pixels, P patch side, h w patches, N = h*w, g native grid.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from unseg.checkpoint.vit import create_dino_vit, interpolate_positions

if TYPE_CHECKING:
    from timm.models.vision_transformer import Block, VisionTransformer

# The qkv layer's output is [q | k | v], each C wide with the heads side by side.
_THIRD = {"query": 0, "key": 1, "value": 2}
_FACETS = (*_THIRD, "token")
# An entry is as large as a feature map of one image. Images mostly come sorted by size.
_MAX_CACHED_GRIDS = 8


class _CachedPositions(NamedTuple):
    """Positions for one grid, and what they were computed from.

    Attributes:
        weights: a copy of the position embedding (1, 1+g*g, C).
        positions: (1, 1+N, C).
    """

    weights: Tensor
    positions: Tensor


def _is_plain(vit: "VisionTransformer") -> bool:
    """Whether the transformer has the parts that DinoViT computes, and no others."""
    grid = vit.patch_embed.grid_size
    return (
        vit.pos_embed is not None
        and vit.pos_embed.shape[1] == 1 + grid[0] * grid[1]
        and grid[0] == grid[1]
        and vit.cls_token is not None
        and vit.reg_token is None
        and vit.blocks[0].attn.qkv.bias is not None
        and isinstance(vit.norm_pre, nn.Identity)
        and isinstance(vit.patch_embed.norm, nn.Identity)
    )


class DinoViT(Backbone):
    """Dense maps of one block of a ViT: its keys, queries, values or output tokens.

    "key", "query" and "value" are the output of the block's qkv layer after its first
    normalisation, heads side by side. "token" is the output of the whole block, without the
    transformer's final normalisation. The class token is dropped from all of them.

    Nothing after the block is computed and, where no token is asked for, of the block itself only
    that normalisation and the part of the qkv matrix that is.

    An image of any size gets h = H // P, w = W // P patches; what is left over at the right and
    bottom is cropped. Nothing is padded: the size divisibility is Detectron2's default of 0.
    """

    @configurable
    def __init__(
        self,
        *,
        vit: "VisionTransformer",
        out_features: Sequence[str] = ("key",),
        block: int = -1,
        freeze: bool = True,
    ):
        """
        Args:
            vit: timm's transformer, with class token and learnt positions, e.g. from
                :func:`unseg.checkpoint.vit.create_dino_vit`. Its weights keep their names, under
                ``vit.``.
            out_features: of "key", "query", "value", "token".
            block: index of the block; negative ones count from the last.
            freeze: the weights ask for no gradients and the module stays in eval mode.

        Raises:
            ValueError: there is no such feature or block, or the transformer is of another kind.
        """
        super().__init__()
        unknown = [name for name in out_features if name not in _FACETS]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.VIT.OUT_FEATURES must name some of {', '.join(_FACETS)}: "
                f"{tuple(out_features)}"
            )
        depth = len(vit.blocks)
        if not -depth <= block < depth:
            raise ValueError(
                f"MODEL.VIT.BLOCK must lie in {-depth}..{depth - 1} for {depth} blocks: {block}"
            )
        if not _is_plain(vit):
            raise ValueError(
                "vit must be as DINO's: one class token, positions for it and a square grid of "
                "patches, a bias in qkv, no normalisation before the blocks"
            )
        self.vit = vit
        self.out_features = tuple(out_features)
        self.block = block % depth
        self.freeze = freeze
        self.patch_size = vit.patch_embed.patch_size[0]
        self._cache: dict[tuple[int, int], _CachedPositions] = {}
        for parameter in vit.parameters() if freeze else self._unused_parameters():
            # Distributed training waits for the gradient of all that ask for one.
            parameter.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        node = cfg.MODEL.VIT
        return {
            "vit": create_dino_vit(node.ARCH, node.PATCH_SIZE),
            "out_features": node.OUT_FEATURES,
            "block": node.BLOCK,
            "freeze": node.FREEZE,
        }

    def train(self, mode: bool = True) -> "DinoViT":
        """A frozen transformer stays in eval mode."""
        return super().train(mode and not self.freeze)

    def output_shape(self) -> dict[str, ShapeSpec]:
        shape = ShapeSpec(channels=self.vit.embed_dim, stride=self.patch_size)
        return dict.fromkeys(self.out_features, shape)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (B, 3, H, W) normalised images, H and W at least P.

        Returns:
            per name of `out_features` (B, C, h, w), in channels-last memory order.

        Raises:
            ValueError: `x` has another number of dimensions, or an image is smaller than a patch.
        """
        if x.dim() != 4 or min(x.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"images must be (B, 3, H, W), at least one patch of {self.patch_size} pixels "
                f"high and wide: {tuple(x.shape)}"
            )
        tokens, grid = self._embed(x)
        for block in self.vit.blocks[: self.block]:
            tokens = block(tokens)
        maps = self._facets(self.vit.blocks[self.block], tokens)
        return {
            name: maps[name].unflatten(1, grid).permute(0, 3, 1, 2) for name in self.out_features
        }

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, 1+N, C) that enter the first block, and the grid (h, w)."""
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        x = x[:, :, : grid[0] * self.patch_size, : grid[1] * self.patch_size]
        patches = self.vit.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, N, C)
        cls_token = self.vit.cls_token.expand(len(x), -1, -1)
        return torch.cat((cls_token, patches), dim=1) + self._positions(grid), grid

    def _facets(self, block: "Block", tokens: Tensor) -> dict[str, Tensor]:
        """The wanted outputs of a block as (B, N, C), from tokens (B, 1+N, C)."""
        maps = {}
        thirds = [name for name in self.out_features if name in _THIRD]
        if thirds:
            patches = block.norm1(tokens[:, 1:])
            weights = block.attn.qkv.weight.chunk(3)
            biases = block.attn.qkv.bias.chunk(3)
            for name in thirds:
                maps[name] = F.linear(patches, weights[_THIRD[name]], biases[_THIRD[name]])
        if "token" in self.out_features:
            maps["token"] = block(tokens)[:, 1:]
        return maps

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, 1+N, C) for a grid.

        Resampling takes a CPU up to a few hundredths of a second: without gradients, the last grids
        are kept. Whether they are still right is decided by comparing the weights, since torch
        counts neither what fused optimizers write nor what is written through ``data``. On a GPU
        the comparison would stop the queue, and resampling is one kernel.
        """
        weights = self.vit.pos_embed
        needs_grad = torch.is_grad_enabled() and weights.requires_grad
        if needs_grad or weights.device.type != "cpu":
            return interpolate_positions(weights, grid)
        # Entries are read and replaced as a whole: threads may share this dict.
        entry = self._cache.get(grid)
        if (
            entry is None
            or entry.weights.dtype != weights.dtype
            or not torch.equal(entry.weights, weights)
        ):
            if len(self._cache) >= _MAX_CACHED_GRIDS:
                self._cache = {}
            copied = weights.detach().clone()
            entry = _CachedPositions(copied, interpolate_positions(copied, grid))
            self._cache[grid] = entry
        return entry.positions

    def _unused_parameters(self) -> list[nn.Parameter]:
        """Weights that no output depends on."""
        unused = [self.vit.norm, *self.vit.blocks[self.block + 1 :]]
        if "token" not in self.out_features:
            block = self.vit.blocks[self.block]
            unused += [block.attn.proj, block.norm2, block.mlp]
        return [parameter for module in unused for parameter in module.parameters()]


@BACKBONE_REGISTRY.register()
def build_dino_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> DinoViT:
    """The ViT of ``cfg.MODEL.VIT``; its weights come from MODEL.WEIGHTS."""
    return DinoViT(cfg, input_shape)
