"""Two ways to see regions: in the detector's features, or in the image's pixels.

Both give one vector per region and view. See :mod:`unseg.modeling.roi_heads.regions` for the
letters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, paste_masks_in_image
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from fvcore.nn import weight_init
from torch import Tensor, nn

from unseg.data.square_crop import Square
from unseg.layers import resize_image
from unseg.modeling.roi_heads.regions import (
    Regions,
    pool_cells,
    resample_masks,
    view_weights,
    windows_around,
)

# A residual network makes images smaller by this.
_STRIDE = 32
# Crops that go through the network at a time where no gradient is kept.
_CROPS_AT_ONCE = 64


class FeatureEncoder(nn.Module):
    """FEATURE_SOURCE "roi" [ours]: pooled features F, F * mask, F * (1 - mask), convolutions, mean.

    Features are pooled once for all views. They have seen what is around a mask through their
    receptive field, so views are separated less well than in pixels.
    """

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        pooler: ROIPooler,
        in_channels: int,
        num_conv: int = 2,
        conv_dim: int = 256,
        pool: str = "mean",
        box_mode: str = "square",
    ):
        """
        Args:
            in_features: names of the features that are pooled.
            pooler: cuts windows out of them; its output is square.
            in_channels: their channels.
            num_conv, conv_dim: 3x3 convolutions with ReLU, and their channels.
            pool: see :func:`pool_cells`.
            box_mode: see :func:`windows_around`.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.pooler = pooler
        self.pool = pool
        self.box_mode = box_mode
        self.convs = nn.ModuleList()
        channels = in_channels
        for _ in range(num_conv):
            conv = Conv2d(channels, conv_dim, kernel_size=3, padding=1, activation=nn.ReLU())
            weight_init.c2_msra_fill(conv)
            self.convs.append(conv)
            channels = conv_dim
        self.out_channels = channels

    @classmethod
    def build(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> "FeatureEncoder":
        """From cfg.MODEL.HIERARCHICAL_EMBEDDING.

        Raises:
            ValueError: a feature that there is not, or features of several widths.
        """
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        names = node.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES
        key = "MODEL.HIERARCHICAL_EMBEDDING.IN_FEATURES"
        missing = [name for name in names if name not in input_shape]
        if missing:
            raise ValueError(f"{key}: there is no {missing}, only {sorted(input_shape)}")
        channels = {input_shape[name].channels for name in names}
        if len(channels) != 1:
            raise ValueError(f"{key}: {names} must have equal channels, got {sorted(channels)}")
        pooler = ROIPooler(
            output_size=node.POOLER_RESOLUTION,
            scales=tuple(1.0 / input_shape[name].stride for name in names),
            sampling_ratio=node.POOLER_SAMPLING_RATIO,
            pooler_type=node.POOLER_TYPE,
        )
        return cls(
            in_features=names,
            pooler=pooler,
            in_channels=channels.pop(),
            num_conv=node.NUM_CONV,
            conv_dim=node.CONV_DIM,
            pool=node.POOL,
            box_mode=node.BOX_MODE,
        )

    def forward(self, regions: Regions, views: Sequence[str]) -> Tensor:
        """
        Args:
            regions: N of them in all images.
            views: some of VIEWS.

        Returns:
            float32 (V N, out_channels), all regions' first view first.
        """
        windows = [windows_around(boxes, self.box_mode) for boxes in regions.boxes]
        features = [regions.features[name].float() for name in self.in_features]
        pooled = self.pooler(features, [Boxes(x) for x in windows])
        masks = torch.cat(
            [
                resample_masks(masks, regions.frames(i), window, pooled.shape[-1])
                for i, (masks, window) in enumerate(zip(regions.masks, windows, strict=True))
            ]
        )
        weights = view_weights(masks, views)
        x = pooled.repeat(len(views), 1, 1, 1) * weights[:, None]
        for conv in self.convs:
            x = conv(x)
        return pool_cells(x, weights, self.pool)


class CropEncoder(nn.Module):
    """FEATURE_SOURCE "crop", the paper's: pixels in a window, masked, resized, a residual network.

    What a view does not show, and what lies outside of the image, is black. Norms are frozen: they
    keep the statistics that come with the weights, whatever the batch (random weights: none).

    Its weights have other names than those of Detectron2's ResNet, so that none of them is taken
    for a backbone's when a pickle of the model zoo is loaded.
    """

    def __init__(
        self,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        crop_size: int = 224,
        depth: int = 18,
        frozen: bool = True,
        normalize: bool = False,
        pool: str = "mean",
        box_mode: str = "square",
    ):
        """
        Args:
            pixel_mean, pixel_std: of the detector, whose normalised input is turned back.
            crop_size: side of the crops in pixels, a multiple of 32.
            depth: of the network: 18, 34, 50, 101 or 152.
            frozen: its weights are not trained.
            normalize: apply mean and deviation to the masked crops; else they are divided by 255.
            pool: see :func:`pool_cells`.
            box_mode: see :func:`windows_around`; windows are of whole pixels.

        Raises:
            ValueError: there is no such network, or crops of this size do not fit to it.
        """
        super().__init__()
        if depth not in (18, 34, 50, 101, 152):
            raise ValueError(f"CROP_DEPTH must be 18, 34, 50, 101 or 152, got {depth}")
        if crop_size < _STRIDE or crop_size % _STRIDE:
            raise ValueError(f"CROP_SIZE must be a multiple of {_STRIDE}, got {crop_size}")
        self.crop_size = crop_size
        self.frozen = frozen
        self.normalize = normalize
        self.pool = pool
        self.box_mode = box_mode
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        # Strides as in torchvision's networks.
        options = {"stride_in_1x1": False} if depth >= 50 else {}
        stages = ResNet.make_default_stages(depth, norm="FrozenBN", **options)
        stem = BasicStem(in_channels=len(pixel_mean), norm="FrozenBN")
        self.stages = nn.Sequential(stem, *(nn.Sequential(*stage) for stage in stages))
        self.out_channels = stages[-1][-1].out_channels
        if frozen:
            self.requires_grad_(False)

    @classmethod
    def build(cls, cfg: CfgNode) -> "CropEncoder":
        """From cfg.MODEL.HIERARCHICAL_EMBEDDING, with random weights: CROP_WEIGHTS is not read."""
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        return cls(
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            crop_size=node.CROP_SIZE,
            depth=node.CROP_DEPTH,
            frozen=node.CROP_FREEZE,
            normalize=node.CROP_NORMALIZE,
            pool=node.POOL,
            box_mode=node.BOX_MODE,
        )

    def load_resnet(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a Detectron2 ResNet: "stem.conv1.weight", "res2.0.conv1.weight", ...

        Args:
            weights: those and others, which are left out.

        Raises:
            RuntimeError: weights are missing or have another shape.
        """
        places = {"stem": 0, "res2": 1, "res3": 2, "res4": 3, "res5": 4}
        own = {}
        for name, value in weights.items():
            stage, _, rest = name.partition(".")
            if stage in places and not rest.startswith("fc."):
                own[f"{places[stage]}.{rest}"] = torch.as_tensor(value)
        self.stages.load_state_dict(own)

    def forward(self, regions: Regions, views: Sequence[str]) -> Tensor:
        """
        Args:
            regions: N of them in all images, with the images.
            views: some of VIEWS.

        Returns:
            float32 (V N, out_channels), all regions' first view first.

        Raises:
            RuntimeError: there are no images.
        """
        if regions.images is None:
            raise RuntimeError(
                'FEATURE_SOURCE "crop" embeds pixels, and boxes were given without the images: '
                "call forward_with_given_boxes inside `with roi_heads.showing(images):`"
            )
        crops, masks = [], []
        for index in range(len(regions.boxes)):
            for crop, mask in self.cut(regions, index, views):
                crops.append(crop)
                masks.append(mask)
        if not crops:
            # Also without regions every weight has a gradient.
            idle = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0
            return regions.boxes[0].new_zeros(0, self.out_channels) + idle
        weights = view_weights(torch.stack(masks), views)
        x = torch.stack(crops, dim=1).flatten(0, 1)
        x = (x - self.pixel_mean) / self.pixel_std if self.normalize else x / 255.0
        if not self.frozen and torch.is_grad_enabled():
            return pool_cells(self.stages(x), weights, self.pool)
        with torch.no_grad():
            parts = zip(x.split(_CROPS_AT_ONCE), weights.split(_CROPS_AT_ONCE), strict=True)
            return torch.cat([pool_cells(self.stages(x), w, self.pool) for x, w in parts])

    def cut(
        self, regions: Regions, index: int, views: Sequence[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The regions of an image one by one.

        Yields:
            crops float32 (V, C, crop_size, crop_size) in the image's own values, 0 to 255, and the
            share of each of the network's last cells that the mask covers, float32 (S, S).
        """
        height, width = regions.image_sizes[index]
        image = regions.images.tensor[index, :, :height, :width].float()
        image = image * self.pixel_std + self.pixel_mean
        masks = image_masks(regions, index)
        size = (self.crop_size, self.crop_size)
        for box, mask in zip(regions.boxes[index].tolist(), masks, strict=True):
            window = whole_window(box, self.box_mode)
            pixels, inside = _cut(image, window), _cut(mask[None].float(), window)
            seen = (pixels * view_weights(inside, views)[:, None]).flatten(0, 1)
            crops = resize_image(seen, size).unflatten(0, (len(views), -1))
            frame = inside.new_tensor([[0.0, 0.0, inside.shape[2], inside.shape[1]]])
            yield crops, resample_masks(inside, frame, frame, self.crop_size // _STRIDE)[0]


def whole_window(box: Sequence[float], mode: str) -> tuple[int, int, int, int]:
    """:func:`windows_around` of one box in whole pixels, at least one: XYXY."""
    x0, y0, x1, y1 = box
    if mode == "square":
        square = Square.around((x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0))
        return (square.left, square.top, square.left + square.side, square.top + square.side)
    x0, y0, x1, y1 = (math.floor(side + 0.5) for side in box)
    return (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


def image_masks(regions: Regions, index: int) -> Tensor:
    """The masks of an image, bool (N, H, W), as Detectron2 pastes them."""
    masks, size = regions.masks[index], regions.image_sizes[index]
    if not regions.whole_images:
        return paste_masks_in_image(masks.float(), Boxes(regions.boxes[index]), size, 0.5)
    if tuple(masks.shape[-2:]) == tuple(size) or not len(masks):
        return masks.new_zeros(0, *size).bool() if not len(masks) else masks >= 0.5
    return torch.stack([resize_image(mask[None], size)[0] >= 0.5 for mask in masks])


def _cut(image: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """A window XYXY of an image (C, H, W), 0 outside of it."""
    height, width = image.shape[1:]
    x0, y0, x1, y1 = window
    cut = image.new_zeros(len(image), y1 - y0, x1 - x0)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left < right and top < bottom:
        cut[:, top - y0 : bottom - y0, left - x0 : right - x0] = image[:, top:bottom, left:right]
    return cut
