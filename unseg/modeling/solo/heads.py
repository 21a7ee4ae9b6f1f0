"""The two heads of SOLOv2 (Wang et al., NeurIPS 2020), with FreeSOLO's embedding branch.

Module names and shapes are those of the released FreeSOLO checkpoints.

Legend: B images, C channels, S grid cells per side, L levels, E kernel and mask channels,
D embedding length, h w a feature map's size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn


def append_coordinates(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C + 2, h, w): x, then y, from -1 at the first to 1 at the last cell."""
    b, _, h, w = features.shape
    y = torch.linspace(-1, 1, h, dtype=features.dtype, device=features.device)
    x = torch.linspace(-1, 1, w, dtype=features.dtype, device=features.device)
    return torch.cat(
        [features, x.expand(b, 1, h, w), y[:, None].expand(b, 1, h, w)],
        dim=1,
    )


def make_norm(name: str, channels: int, groups: int) -> nn.Module:
    """Detectron2's norm of that name, and GN with this number of groups.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    if name != "GN":
        return get_norm(name, channels)
    if channels % groups:
        raise ValueError(
            f"MODEL.FREESOLO.GN_GROUPS {groups} does not divide a head's {channels} channels"
        )
    return nn.GroupNorm(groups, channels)


def _init_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class InstanceHead(nn.Module):
    """Per grid cell a category score, a dynamic 1x1 kernel and a semantic embedding.

    The weights are shared by all levels.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        strides: Sequence[int],
        num_grids: Sequence[int],
        num_classes: int,
        num_kernels: int,
        embedding_dim: int,
        channels: int,
        num_convs: int,
        norm: str = "GN",
        groups: int = 32,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            input_shape: of the backbone's outputs.
            in_features: L levels, of equal width.
            strides: pixels per cell that each level is resized to before it meets its grid.
            num_grids: S of each level.
            num_classes, num_kernels, embedding_dim: outputs per cell.
            channels, num_convs: width and depth of the towers.
            norm, groups: see :func:`make_norm`.
            prior_prob: initial category score.

        Raises:
            ValueError: the lists differ in length, or levels differ in width.
        """
        super().__init__()
        if not len(in_features) == len(strides) == len(num_grids):
            raise ValueError(
                "MODEL.FREESOLO: INSTANCE_IN_FEATURES, FPN_INSTANCE_STRIDES and NUM_GRIDS must "
                f"have one length, got {len(in_features)}, {len(strides)} and {len(num_grids)}"
            )
        widths = {input_shape[name].channels for name in in_features}
        if len(widths) != 1:
            raise ValueError(f"INSTANCE_IN_FEATURES must have one width, got {sorted(widths)}")
        (width,) = widths
        self.in_features = tuple(in_features)
        self.strides = tuple(strides)
        self.num_grids = tuple(num_grids)

        def tower(first: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i in range(num_convs):
                before = channels if i else first
                layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=norm == ""))
                layers += [make_norm(norm, channels, groups) or nn.Identity(), nn.ReLU(True)]
            return nn.Sequential(*layers)

        self.cate_tower = tower(width)
        self.kernel_tower = tower(width + 2)
        self.cate_pred = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.kernel_pred = nn.Conv2d(channels, num_kernels, 3, padding=1)
        self.emb_pred = nn.Conv2d(channels, embedding_dim, 3, padding=1)
        _init_convolutions(self)
        nn.init.constant_(self.cate_pred.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        solo = cfg.MODEL.FREESOLO
        return {
            "input_shape": input_shape,
            "in_features": solo.INSTANCE_IN_FEATURES,
            "strides": solo.FPN_INSTANCE_STRIDES,
            "num_grids": solo.NUM_GRIDS,
            "num_classes": solo.NUM_CLASSES,
            "num_kernels": solo.NUM_KERNELS,
            "embedding_dim": solo.EMB_DIM,
            "channels": solo.INSTANCE_CHANNELS,
            "num_convs": solo.NUM_INSTANCE_CONVS,
            "norm": solo.NORM,
            "groups": solo.GN_GROUPS,
            "prior_prob": solo.PRIOR_PROB,
        }

    def forward(
        self, features: dict[str, Tensor], image_size: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """
        Args:
            features: the backbone's outputs, (B, C, h, w) each.
            image_size: (H, W) of the padded batch.

        Returns:
            L tensors each of category logits (B, classes, S, S), kernels (B, E, S, S) and
            embeddings (B, D, S, S).
        """
        outputs = []
        for name, stride, grid in zip(self.in_features, self.strides, self.num_grids, strict=True):
            x = features[name]
            size = tuple(max(1, side // stride) for side in image_size)
            if x.shape[-2:] != size:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            x = append_coordinates(x)
            x = F.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=False)
            category = self.cate_tower(x[:, :-2])
            outputs.append(
                (
                    self.cate_pred(category),
                    self.kernel_pred(self.kernel_tower(x)),
                    self.emb_pred(category),
                )
            )
        categories, kernels, embeddings = zip(*outputs, strict=True)
        return list(categories), list(kernels), list(embeddings)


class MaskHead(nn.Module):
    """Fuses levels into the mask features F (B, E, h, w), at the stride of the first level."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        channels: int,
        num_kernels: int,
        norm: str = "GN",
        groups: int = 32,
    ):
        """
        Args:
            input_shape: of the backbone's outputs.
            in_features: levels whose stride doubles from one to the next; the last one gets
                coordinates.
            channels: width of the branch.
            num_kernels: E.
            norm, groups: see :func:`make_norm`.

        Raises:
            ValueError: the strides do not double.
        """
        super().__init__()
        strides = [input_shape[name].stride for name in in_features]
        if any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise ValueError(f"strides of MASK_IN_FEATURES must double, got {strides}")
        self.in_features = tuple(in_features)
        self.stride = strides[0]

        def block(before: int, after: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=norm == ""),
                make_norm(norm, after, groups) or nn.Identity(),
                nn.ReLU(True),
            )

        self.convs_all_levels = nn.ModuleList()
        for level, name in enumerate(in_features):
            first = input_shape[name].channels + (2 if level and level + 1 == len(strides) else 0)
            branch = nn.Sequential()
            for i in range(max(level, 1)):
                branch.add_module(f"conv{i}", block(channels if i else first, channels, 3))
                if level:
                    branch.add_module(
                        f"upsample{i}",
                        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                    )
            self.convs_all_levels.append(branch)
        self.conv_pred = block(channels, num_kernels, 1)
        _init_convolutions(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        solo = cfg.MODEL.FREESOLO
        return {
            "input_shape": input_shape,
            "in_features": solo.MASK_IN_FEATURES,
            "channels": solo.MASK_CHANNELS,
            "num_kernels": solo.NUM_KERNELS,
            "norm": solo.NORM,
            "groups": solo.GN_GROUPS,
        }

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """The mask features (B, E, h, w) of the backbone's outputs."""
        total = None
        last = len(self.in_features) - 1
        for level, (name, branch) in enumerate(
            zip(self.in_features, self.convs_all_levels, strict=True)
        ):
            x = features[name]
            x = branch(append_coordinates(x) if level and level == last else x)
            total = x if total is None else total + x
        return self.conv_pred(total)
