"""torchvision's VGG as a backbone, at stride 16, or at stride 8 by the hole algorithm.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition" (2015);
pool4 at stride 1 with dilated conv5 (Chen et al., "Semantic image segmentation with deep
convolutional nets and fully connected CRFs", 2015) as InstanceFCN has it (Dai et al., 2016).
DeepMask's trunk is VGG-A without its last pool (Pinheiro et al., 2015).

Legend: B images, H W image pixels, C channels, h w cells.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.models import vgg as torchvision_vgg

# torchvision's letters, which are the paper's.
_CONFIGURATIONS = {11: "A", 13: "B", 16: "D", 19: "E"}
_STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5")
_POOL4 = 3  # its index among the pools


def _check(depth: int, out_features: Sequence[str], pool4_stride: int, dilation: int) -> None:
    """Raise a ValueError that names the config's key."""
    if depth not in _CONFIGURATIONS:
        raise ValueError(f"MODEL.VGG.DEPTH must be 11, 13, 16 or 19: {depth}")
    if not out_features or any(name not in _STAGES for name in out_features):
        raise ValueError(
            f"MODEL.VGG.OUT_FEATURES must name some of {', '.join(_STAGES)}: {tuple(out_features)}"
        )
    if pool4_stride not in (1, 2):
        raise ValueError(f"MODEL.VGG.POOL4_STRIDE must be 1 or 2: {pool4_stride}")
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"MODEL.VGG.CONV5_DILATION must be a positive int: {dilation}")


def _same_size_pool() -> nn.Sequential:
    """A 2x2 max pool of stride 1 that keeps the size, by a row below and a column at the right.

    Cell i is the maximum of cells i and i+1, so that the even ones are those of the pool of stride
    2. It follows a ReLU: zeros change no maximum.
    """
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(kernel_size=2, stride=1))


class VGG(Backbone):
    """torchvision's VGG features, each stage's last map before its pool.

    The weights are torchvision's under torchvision's names (``features.0.weight``, ...); strides
    and dilations have none. Maps of odd height or width lose their last row or column at a pool of
    stride 2, as in torchvision. Nothing is padded: the size divisibility is Detectron2's 0.
    """

    @configurable
    def __init__(
        self,
        *,
        depth: int = 16,
        out_features: Sequence[str] = ("conv5",),
        pool4_stride: int = 2,
        conv5_dilation: int = 1,
        freeze_at: int = 0,
        in_channels: int = 3,
    ):
        """
        Args:
            depth: 11, 13, 16 or 19, without batch normalisation.
            out_features: of "conv1" to "conv5". Stages after the last of them are not built.
            pool4_stride: 2, or 1 for a conv5 of the size of conv4.
            conv5_dilation: of conv5's convolutions; 2 with `pool4_stride` 1 is the hole algorithm.
            freeze_at: the first stages whose weights ask for no gradients, 0 to 5.
            in_channels: channels of the images; VGG's configurations are built for 3.

        Raises:
            ValueError: one of them has no such value; the message names the config's key.
        """
        super().__init__()
        _check(depth, out_features, pool4_stride, conv5_dilation)
        if not 0 <= freeze_at <= len(_STAGES):
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to 5 for a VGG: {freeze_at}")
        if in_channels != 3:
            raise ValueError(f"images must have 3 channels for a VGG: {in_channels}")
        self.out_features = tuple(out_features)
        # Without the classifier, which holds most of the weights and of the time to draw them.
        layers = list(torchvision_vgg.make_layers(torchvision_vgg.cfgs[_CONFIGURATIONS[depth]]))
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        last = max(_STAGES.index(name) for name in out_features)
        self._stage_by_end = {pools[i] - 1: _STAGES[i] for i in range(last + 1)}
        if pool4_stride == 1:
            layers[pools[_POOL4]] = _same_size_pool()
        for layer in layers[pools[_POOL4] + 1 :]:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (conv5_dilation, conv5_dilation)
        self.features = nn.Sequential(*layers[: pools[last]])
        self._shapes = self._shapes_of(pool4_stride)
        self._init_weights()
        if freeze_at:
            for parameter in self.features[: pools[min(freeze_at - 1, last)]].parameters():
                parameter.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        node = cfg.MODEL.VGG
        return {
            "depth": node.DEPTH,
            "out_features": node.OUT_FEATURES,
            "pool4_stride": node.POOL4_STRIDE,
            "conv5_dilation": node.CONV5_DILATION,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_channels": 3 if input_shape is None else input_shape.channels,
        }

    def _shapes_of(self, pool4_stride: int) -> dict[str, ShapeSpec]:
        """Channels and stride of each stage that is built."""
        shapes, stride = {}, 1
        for end, name in self._stage_by_end.items():
            shapes[name] = ShapeSpec(channels=self.features[end - 1].out_channels, stride=stride)
            stride *= pool4_stride if name == _STAGES[_POOL4] else 2
        return shapes

    def _init_weights(self) -> None:
        """As torchvision draws them."""
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: self._shapes[name] for name in self.out_features}

    def cell_offsets(self) -> dict[str, float]:
        """Per output where the centre of its first cell lies, in pixels from the image's edge.

        Cell i's receptive field is centred on ``stride * i + offset``, along both axes. Half a
        stride (4 for conv4) but for conv5 at stride 8: its pool joins cells i and i+1, which puts
        the centre on 8i + 8.
        """
        return {name: 2.0 ** _STAGES.index(name) / 2 for name in self.out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (B, 3, H, W) normalised images.

        Returns:
            per name of `out_features` (B, C, h, w) after the stage's last ReLU, with h and w the
            image's sides over the stride, rounded down.

        Raises:
            ValueError: `x` has another number of dimensions or channels, or an image is smaller
                than one cell of the deepest map.
        """
        cell = max(shape.stride for shape in self._shapes.values())
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < cell:
            raise ValueError(
                f"images must be (B, 3, H, W), at least {cell} pixels high and wide: "
                f"{tuple(x.shape)}"
            )
        maps = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self._stage_by_end:
                maps[self._stage_by_end[i]] = x
        return {name: maps[name] for name in self.out_features}


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> VGG:
    """The VGG of ``cfg.MODEL.VGG``; its weights come from MODEL.WEIGHTS."""
    return VGG(cfg, input_shape)
