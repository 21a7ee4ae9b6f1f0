"""A model that knows what objects are, red ones, and folders of images with such objects."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from PIL import Image
from torch import nn

GRAY = 100  # the background, and the pixel mean
YAML = """
MODEL:
  META_ARCHITECTURE: {arch}
  DEVICE: cpu
  PIXEL_MEAN: [100.0, 100.0, 100.0]
  PIXEL_STD: [50.0, 50.0, 50.0]
  EXEMPLAR:
    IN_FEATURE: cells
    BUILD: {{SHORT_SIDE: 32, MAX_SIDE: 64, BATCH_SIZE: 2, GRABCUT_ITERATIONS: 1}}
INPUT: {{FORMAT: {format}, MIN_SIZE_TEST: 48, MAX_SIZE_TEST: 96}}
DISCOVERY: {{BATCH_SIZE: 4}}
DATALOADER: {{NUM_WORKERS: 0}}
"""


class Cells(nn.Module):
    """Mean normalised colours of 8 x 8 pixels."""

    size_divisibility = 0

    def forward(self, images):
        return {"cells": F.avg_pool2d(images, 8)}


@META_ARCH_REGISTRY.register()
class RedThings(nn.Module):
    """Finds the red pixels of an image; and, more confidently, a strip at its upper border.

    `seen` are the sizes of the images it was given.
    """

    @configurable
    def __init__(self, *, mean, std, input_format):
        super().__init__()
        self.backbone = Cells()
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.seen = []

    @classmethod
    def from_config(cls, cfg):
        return {"mean": cfg.MODEL.PIXEL_MEAN, "std": cfg.MODEL.PIXEL_STD,
                "input_format": cfg.INPUT.FORMAT}  # fmt: skip

    @property
    def device(self):
        return self.pixel_mean.device

    def forward(self, inputs):
        assert not self.training
        return [{"instances": self.find(x)} for x in inputs]

    def find(self, x):
        image = x["image"].float()
        self.seen.append(tuple(image.shape[1:]))
        red, _, blue = image if self.input_format == "RGB" else image.flip(0)
        soft = ((red - blue > 60)[None, None]).float()
        size = (x["height"], x["width"])
        masks = F.interpolate(soft, size=size, mode="bilinear")[0] > 0.5
        strip = torch.zeros_like(masks)
        strip[:, :2] = True
        instances = Instances(size)
        instances.pred_masks = torch.cat([strip, masks])[: 2 if masks.any() else 0]
        instances.scores = torch.tensor([0.9, 0.8])[: 2 if masks.any() else 0]
        return instances


@META_ARCH_REGISTRY.register()
class BoxesOnly(RedThings):
    """A model without masks."""

    def find(self, x):
        instances = super().find(x)
        instances.remove("pred_masks")
        return instances


def write_config(folder, arch="RedThings", input_format="RGB"):
    path = folder / f"{arch}_{input_format}.yaml"
    path.write_text(YAML.format(arch=arch, format=input_format))
    return path


def red_image(box=(24, 16, 56, 40), size=(64, 80), color=(220, 40, 30), seed=0):
    """Faint noise on gray with a box (x0, y0, x1, y1) of one colour."""
    noise = np.random.default_rng(seed).integers(-3, 4, (*size, 3))
    image = (GRAY + noise).astype(np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = color
    return image


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def arguments(config, output, *opts, images=None, dataset=None, **flags):
    """What the command line makes of these, with the defaults of the others."""
    defaults = {"resume": False, "num_gpus": 1, "num_shards": 0, "shard": 0}
    return argparse.Namespace(
        config_file=str(config),
        output=str(output),
        images=None if images is None else str(images),
        dataset=dataset,
        opts=[str(opt) for opt in opts],
        **(defaults | {"random_weights": False} | flags),
    )
