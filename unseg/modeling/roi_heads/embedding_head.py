"""The head that embeds regions in the Poincaré ball (Weng et al., "Unsupervised Discovery of the
Long-Tail in Instance Segmentation Using Hierarchical Self-Supervision", CVPR 2021).

Legend: N regions, D dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from fvcore.nn import weight_init
from torch import Tensor, nn

from unseg.geometry import PoincareBall, clip_tangent
from unseg.modeling.roi_heads.region_encoders import CropEncoder, FeatureEncoder
from unseg.modeling.roi_heads.regions import BOX_MODES, POOLS, Regions
from unseg.structures.clusters import GEOMETRIES

ROI_EMBEDDING_HEAD_REGISTRY = Registry("ROI_EMBEDDING_HEAD")
ROI_EMBEDDING_HEAD_REGISTRY.__doc__ = """
Heads that embed regions: called with `cfg` and the shapes of the features (by name), they are
modules with the interface of HierarchicalEmbeddingHead: forward, to_points, geometry, c, embed_dim.
"""

FEATURE_SOURCES = ("roi", "crop")


def build_roi_embedding_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The head MODEL.HIERARCHICAL_EMBEDDING.NAME.

    Args:
        cfg: with add_unseg_config's keys.
        input_shape: of the features that it is given, by name.
    """
    return ROI_EMBEDDING_HEAD_REGISTRY.get(cfg.MODEL.HIERARCHICAL_EMBEDDING.NAME)(cfg, input_shape)


@ROI_EMBEDDING_HEAD_REGISTRY.register()
class HierarchicalEmbeddingHead(nn.Module):
    """An encoder, linear layers with ReLU, and one to tangent vectors at the ball's origin.

    All of it is computed in float32, whatever autocast says.
    """

    @configurable
    def __init__(
        self,
        *,
        encoder: nn.Module,
        num_fc: int = 1,
        fc_dim: int = 256,
        embed_dim: int = 64,
        init_std: float = 0.01,
        geometry: str = "poincare",
        c: float = 1.0,
        max_tangent_norm: float = 2.5,
        riemannian_grad_scale: bool = False,
    ):
        """
        Args:
            encoder: (regions, views) to float32 (V N, out_channels), see FeatureEncoder.
            num_fc, fc_dim: linear layers before the last one, and their channels.
            embed_dim: D.
            init_std: of the last layer's weights; small ones put everything near the origin, where
                all distances vanish and so do the gradients.
            geometry: "poincare" or "euclidean".
            c: the ball's curvature is -c.
            max_tangent_norm: tangents are cut to this / sqrt(c) ("poincare" only): beyond, float32
                points are on the ball's rim, and nothing draws them back.
            riemannian_grad_scale: multiply gradients by ((1 - c |x|^2) / 2)^2, the inverse of the
                metric at the point x, as the authors do.

        Raises:
            ValueError: a geometry that there is not; c or a norm that is not positive; D below 1.
        """
        super().__init__()
        if geometry not in GEOMETRIES:
            raise ValueError(f"GEOMETRY must be one of {GEOMETRIES}, got {geometry!r}")
        if embed_dim < 1:
            raise ValueError(f"EMBED_DIM must be at least 1, got {embed_dim}")
        for name, value in (("CURVATURE", c), ("MAX_TANGENT_NORM", max_tangent_norm)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.encoder = encoder
        self.geometry = geometry
        self.c = c
        self.embed_dim = embed_dim
        self.max_tangent_norm = max_tangent_norm
        self.riemannian_grad_scale = riemannian_grad_scale
        self.fcs = nn.ModuleList()
        channels = encoder.out_channels
        for _ in range(num_fc):
            fc = nn.Linear(channels, fc_dim)
            weight_init.c2_xavier_fill(fc)
            self.fcs.append(fc)
            channels = fc_dim
        self.to_tangent = nn.Linear(channels, embed_dim)
        nn.init.normal_(self.to_tangent.weight, std=init_std)
        nn.init.zeros_(self.to_tangent.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        for key, choices in (
            ("FEATURE_SOURCE", FEATURE_SOURCES),
            ("BOX_MODE", BOX_MODES),
            ("POOL", POOLS),
        ):
            if node[key] not in choices:
                raise ValueError(
                    f"MODEL.HIERARCHICAL_EMBEDDING.{key} must be one of {choices}, "
                    f"got {node[key]!r}"
                )
        crop = node.FEATURE_SOURCE == "crop"
        return {
            "encoder": CropEncoder.build(cfg) if crop else FeatureEncoder.build(cfg, input_shape),
            "num_fc": node.NUM_FC,
            "fc_dim": node.FC_DIM,
            "embed_dim": node.EMBED_DIM,
            "init_std": node.INIT_STD,
            "geometry": node.GEOMETRY,
            "c": node.CURVATURE,
            "max_tangent_norm": node.MAX_TANGENT_NORM,
            "riemannian_grad_scale": node.RIEMANNIAN_GRAD_SCALE,
        }

    def forward(self, regions: Regions, views: Sequence[str] = ("fg",)) -> dict[str, Tensor]:
        """
        Args:
            regions: N of them in all images.
            views: some of VIEWS, each once, at least one.

        Returns:
            by view the tangents, float32 (N, D), all regions of the first image first.
        """
        device = self.to_tangent.weight.device
        with torch.autocast(device.type, enabled=False):
            x = self.encoder(regions, views)
            for fc in self.fcs:
                x = fc(x).relu()
            u = self.to_tangent(x)
            if self.geometry == "poincare":
                u = clip_tangent(u, self.max_tangent_norm, self.c)
                if self.riemannian_grad_scale:
                    u = _ScaleGradient.apply(u, self._inverse_metric(u.detach()))
        return dict(zip(views, u.split(sum(regions.counts)) if len(u) else [u] * len(views)))

    def to_points(self, tangents: Tensor) -> Tensor:
        """Points of tangents (N, D), float64 (N, D): in the ball, or the tangents themselves."""
        exact = tangents.double()
        return PoincareBall(self.c).expmap0(exact) if self.geometry == "poincare" else exact

    def _inverse_metric(self, u: Tensor) -> Tensor:
        """((1 - c |x|^2) / 2)^2 of the points x of tangents (N, D): (N, 1). 1 - c |x|^2 is
        1 / cosh(sqrt(c) |u|)^2."""
        norm = math.sqrt(self.c) * torch.linalg.vector_norm(u, dim=1, keepdim=True)
        return 0.25 / norm.cosh() ** 4


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied. A factor per row may as well be applied at the
    tangent as at the point: the map between the two is linear in the gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None
