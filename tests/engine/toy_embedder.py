"""A model whose objects and embeddings depend on the image's id alone."""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn
from toy_proposer import EMPTY, in_form, random_boxes, size_of

DIM = 5
YAML = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: ToyEmbedder
  DEVICE: cpu
  HIERARCHICAL_EMBEDDING: {EMBED_DIM: 7, CURVATURE: 0.5}
INPUT: {FORMAT: RGB, MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 64}
DISCOVERY: {BATCH_SIZE: 2}
DATALOADER: {NUM_WORKERS: 0}
"""


def found_in(image_id):
    """Boxes int (N, 4), scores float32 (N,) and tangents float32 (N, DIM)."""
    generator = np.random.default_rng([image_id, 2])
    count = 0 if image_id == EMPTY else 3 + image_id % 4
    boxes = random_boxes(generator, count, size_of(image_id))
    scores = np.sort(generator.random(count).astype(np.float32))[::-1].copy()
    return boxes, scores, generator.normal(size=(count, DIM)).astype(np.float32)


@META_ARCH_REGISTRY.register()
class ToyEmbedder(nn.Module):
    """Gives :func:`found_in`; `form` is that of its masks, see toy_proposer.

    `batches` are the ids of the images that it was given.
    """

    @configurable
    def __init__(self, form="bool"):
        super().__init__()
        self.form = form
        self.batches = []

    @classmethod
    def from_config(cls, cfg):
        return {}

    def forward(self, inputs):
        assert not self.training
        self.batches.append([x["image_id"] for x in inputs])
        return [{"instances": self.find(x)} for x in inputs]

    def find(self, x):
        size = (x["height"], x["width"])
        boxes, scores, tangents = found_in(int(x["image_id"]))
        instances = Instances(size)
        instances.pred_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.scores = torch.from_numpy(scores)
        instances.pred_tangents = torch.from_numpy(tangents)
        instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
        if self.form != "none":
            instances.pred_masks = in_form(self.form, boxes, size)
        return instances
