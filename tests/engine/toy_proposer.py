"""A model whose proposals depend on the image's id alone, and a data set of objects for them."""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from unseg.layers import pack_masks
from unseg.structures import WindowMasks, encode_masks

SIZES = [(48, 64), (64, 48), (50, 70)]
EMPTY = 13  # the id of the image that the model proposes nothing for
IDS = [30, 11, 12, EMPTY, 14, 9, 16]
YAML = """
VERSION: 2
MODEL: {META_ARCHITECTURE: ToyProposer, DEVICE: cpu}
INPUT: {FORMAT: RGB, MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 64}
DISCOVERY: {BATCH_SIZE: 2}
DATALOADER: {NUM_WORKERS: 0}
"""


def rectangle(box, size):
    """bool (H, W) of a box XYXY in whole pixels."""
    mask = torch.zeros(size, dtype=torch.bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def random_boxes(generator, count, size):
    """int (count, 4) XYXY with at least 3 pixels a side."""
    height, width = size
    x0, y0 = generator.integers(0, width - 4, count), generator.integers(0, height - 4, count)
    w, h = generator.integers(3, 40, count), generator.integers(3, 40, count)
    return np.stack([x0, y0, np.minimum(x0 + w, width), np.minimum(y0 + h, height)], axis=1)


def size_of(image_id):
    return SIZES[image_id % len(SIZES)]


def objects_of(image_id):
    """Boxes of the objects of an image; one without any."""
    count = 0 if image_id == 16 else 1 + image_id % 4
    return random_boxes(np.random.default_rng(image_id), count, size_of(image_id))


def proposals_for(image_id):
    """Boxes int (N, 4) and logits float32 (N,), not sorted; some near objects, some tied."""
    if image_id == EMPTY:
        return np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.float32)
    generator = np.random.default_rng([image_id, 1])
    height, width = size_of(image_id)
    shift = generator.integers(-2, 3, (len(objects_of(image_id)), 4))
    near = np.clip(objects_of(image_id) + shift, 0, [width, height, width, height])
    near = near[(near[:, 2:] - near[:, :2] > 0).all(axis=1)]
    boxes = np.concatenate([random_boxes(generator, 20, (height, width)), near])
    return boxes, generator.integers(-6, 7, len(boxes)).astype(np.float32) / 2


def write_dataset(folder):
    """Images of noise, written to a folder, and their dataset dicts."""
    dicts = []
    for number, image_id in enumerate(IDS):
        size = size_of(image_id)
        noise = np.random.default_rng(image_id).integers(0, 255, (*size, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(noise).save(path)
        annotations = [
            {
                "bbox": [float(x) for x in box],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "area": float((box[2] - box[0]) * (box[3] - box[1])),
                "segmentation": encode_masks(rectangle(box, size)[None])[0],
            }
            for box in objects_of(image_id)
        ]
        record = {"file_name": str(path), "image_id": image_id}
        dicts.append(record | {"height": size[0], "width": size[1], "annotations": annotations})
    return dicts


@META_ARCH_REGISTRY.register()
class ToyProposer(nn.Module):
    """Gives :func:`proposals_for`; `form` is that of its masks.

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
        return [{"proposals": self.propose(x)} for x in inputs]

    def propose(self, x):
        size = (x["height"], x["width"])
        boxes, logits = proposals_for(x["image_id"])
        instances = Instances(size)
        instances.proposal_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.objectness_logits = torch.from_numpy(logits)
        if self.form != "none":
            instances.pred_masks = in_form(self.form, boxes, size)
        return instances


def in_form(form, boxes, size):
    if form == "windows":  # cells smaller than pixels, so that corners are not cut
        return WindowMasks(torch.ones(len(boxes), 40, 40), torch.tensor(boxes).float(), size)
    masks = torch.zeros((0, *size), dtype=torch.bool)
    if len(boxes):
        masks = torch.stack([rectangle(box, size) for box in boxes])
    make = {"bool": lambda x: x, "bits": BitMasks, "packed": pack_masks, "rle": encode_masks}
    return make[form](masks)
