"""Nets whose answers are known, objects, and slow references, for the tests of InstanceFCN."""

import math

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead, LevelMaps
from unseg.modeling.proposals.instance_fcn_losses import WindowTraining
from unseg.modeling.proposals.instance_fcn_windows import make_levels

# Every window that is positive or negative is sampled.
ALL_WINDOWS = {"windows_per_image": 10**6, "pos_fraction": 1.0}


def make_objects(size, boxes, empty=()):
    """Rectangles; those of the indices `empty` have no pixels."""
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if i not in empty:
            masks[i, y0:y1, x0:x1] = True
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.gt_masks = BitMasks(masks)
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return instances


class PoolingBackbone(Backbone):
    """Averages of the image over the cells of each stride: cell i is [stride i, stride (i + 1))."""

    def __init__(self, strides, size_divisibility=0):
        super().__init__()
        self.strides = strides
        self._divisibility = size_divisibility
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def size_divisibility(self):
        return self._divisibility

    def output_shape(self):
        return {name: ShapeSpec(channels=3, stride=s) for name, s in self.strides.items()}

    def forward(self, x):
        return {
            name: nn.functional.avg_pool2d(x, s, ceil_mode=True) * self.scale
            for name, s in self.strides.items()
        }


def make_head(strides, k=3, m=5, hidden=4, training=None, channels=3, **others):
    """A head of maps named p0, p1, ... with random weights of useful size."""
    shapes = {f"p{i}": ShapeSpec(channels=channels, stride=s) for i, s in enumerate(strides)}
    head = InstanceFCNHead(
        in_features=tuple(shapes),
        in_channels=channels,
        levels=make_levels(shapes, tuple(shapes), m, **others),
        k=k,
        m=m,
        hidden=hidden,
        training=WindowTraining(**(ALL_WINDOWS | (training or {}))),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return head


def make_reader(head):
    """Weights with which masks are channel 0 of the features, and scores channel 1: logits
    -10 + 20 x, of all score maps alike."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.mask_branch[0].weight[0, 0] = 1
        head.mask_branch[2].weight[:, 0, 1, 1] = 20
        head.mask_branch[2].bias.fill_(-10)
        head.score_branch[0].weight[0, 1, 1, 1] = 1
        head.score_branch[2].weight[0, 0] = 20
        head.score_branch[2].bias.fill_(-10)


def random_maps(head, batch, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        LevelMaps(
            torch.randn((batch, head.k**2, *size), generator=generator),
            torch.randn((batch, *size), generator=generator),
        )
        for size in sizes
    ]


def bin_of(u, k, m):
    return math.floor((u + 0.5) * k / m)


def slow_labels(level, size, objects, crowds, settings):
    """{(row, column): label or object} of a level: "negative", "ignored" or the object's index."""
    boxes = [
        (i, *box)
        for i, box in enumerate(objects.gt_boxes.tensor.double().tolist())
        if bool(objects.gt_masks.tensor[i].any())
    ]
    unit = level.object_size / 128
    height, width = size
    labels = {}
    for row in range(math.ceil(height / level.stride)):
        for column in range(math.ceil(width / level.stride)):
            x, y = column * level.stride + level.offset, row * level.stride + level.offset
            best, far = None, True
            for i, x0, y0, x1, y1 in boxes:
                dx, dy = x - (x0 + x1) / 2, y - (y0 + y1) / 2
                octaves = abs(math.log2(max(x1 - x0, y1 - y0) / level.object_size))
                shift = max(abs(dx), abs(dy))
                if shift <= settings.pos_shift * unit and octaves <= settings.pos_scale:
                    best = min(best or (math.inf, -1), (dx * dx + dy * dy, i))
                far &= shift >= settings.neg_shift * unit or octaves >= settings.neg_scale
            label = best[1] if best else "negative" if far else "ignored"
            pixel = min(int(y), height - 1), min(int(x), width - 1)
            if crowds is not None and any(bool(mask[pixel]) for mask in crowds.tensor):
                label = "ignored"
            labels[row, column] = label
    return labels


def _softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def slow_losses(head, maps, sizes, objects, crowds=None):
    """The losses in double precision over all windows that are positive or negative."""
    settings, k, m = head.window_training, head.k, head.m
    masks, scores = [], []
    for index, (level, found) in enumerate(zip(head.levels, maps, strict=True)):
        for image, size in enumerate(sizes):
            crowd = crowds[image] if crowds else None
            labels = slow_labels(level, size, objects[image], crowd, settings)
            rows, columns = (math.ceil(side / level.stride) for side in size)
            for (row, column), label in labels.items():
                if label == "ignored":
                    continue
                logit = float(maps[index].scores[image, row, column])
                scores.append(_softplus(logit if label == "negative" else -logit))
                if label == "negative":
                    continue
                half = m * level.stride / 2
                x, y = column * level.stride + level.offset, row * level.stride + level.offset
                box = torch.tensor([[x - half, y - half, x + half, y + half]])
                mask = BitMasks(objects[image].gt_masks.tensor[label : label + 1])
                target = mask.crop_and_resize(box, m)[0]
                cells = []
                for u in range(m):
                    for v in range(m):
                        i, j = row - m // 2 + u, column - m // 2 + v
                        if 0 <= i < rows and 0 <= j < columns:
                            channel = bin_of(u, k, m) * k + bin_of(v, k, m)
                            logit = float(found.masks[image, channel, i, j])
                            cells.append(_softplus(-logit if target[u, v] else logit))
                mean = settings.mask_reduction == "mean"
                masks.append(np.mean(cells) if mean else np.sum(cells))
    return {
        "loss_instance_mask": settings.mask_weight * (np.mean(masks) if masks else 0.0),
        "loss_objectness": settings.score_weight * np.mean(scores),
    }
