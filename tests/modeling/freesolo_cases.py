"""A narrow FreeSOLO and small images with objects, for its tests."""

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from unseg.config import load_config

TINY = "projects/FreeSOLO/configs/freesolo_tiny.yaml"
NARROW = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.FREESOLO.INSTANCE_CHANNELS": 32,
    "MODEL.FREESOLO.NUM_INSTANCE_CONVS": 1,
    "MODEL.FREESOLO.NUM_KERNELS": 8,
    "MODEL.FREESOLO.MASK_CHANNELS": 16,
    "MODEL.FREESOLO.GN_GROUPS": 4,
    "MODEL.FREESOLO.EMB_DIM": 6,
    # What the tests are about, whatever the tiny config chooses.
    "MODEL.FREESOLO.FPN_SCALE_RANGES": [[1, 36], [24, 72], [48, 400]],
    "MODEL.FREESOLO.DATA.STRONG_VIEW": True,
    "MODEL.FREESOLO.DATA.COPY_PASTE": False,
    "MODEL.FREESOLO.DATA.APPEND_WEAK_VIEW": False,
    "SOLVER.EMA.ENABLED": False,
}


def narrow_config(**changes):
    options = NARROW | {k.replace("__", "."): v for k, v in changes.items()}
    return load_config(TINY, [x for item in options.items() for x in item])


def narrow_model(seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(narrow_config(**changes))


def make_objects(masks, dim=6, boxes=None):
    """Objects of bool masks (N, H, W), every third one without embedding."""
    masks = torch.as_tensor(masks)
    objects = Instances(tuple(masks.shape[1:]))
    objects.gt_masks = BitMasks(masks)
    objects.gt_boxes = objects.gt_masks.get_bounding_boxes() if boxes is None else Boxes(boxes)
    objects.gt_classes = torch.zeros(len(masks), dtype=torch.int64)
    embeddings = torch.arange(len(masks) * dim).view(-1, dim).sin()
    embeddings[::3] = 0
    objects.gt_embeddings = embeddings
    return objects


def patches(rng, height, width):
    """uint8 image of flat patches with a little noise."""
    colors = rng.integers(0, 250, (3, -(-height // 12), -(-width // 12)))
    image = colors.repeat(12, axis=1).repeat(12, axis=2)[:, :height, :width]
    return (image + rng.integers(0, 4, image.shape)).astype(np.uint8)


def rectangles(rng, n, height, width):
    masks = np.zeros((n, height, width), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, height - 6), rng.integers(0, width - 6)
        mask[y : y + rng.integers(5, 34), x : x + rng.integers(5, 34)] = True
        mask[y : y + 2, x : x + rng.integers(1, 30)] = True
    return masks


def batch_of(sizes, objects, dtype=torch.uint8, seed=0):
    """Images with so many rectangles each, or with these masks."""
    rng = np.random.default_rng(seed)
    batch = []
    for size, own in zip(sizes, objects, strict=True):
        masks = rectangles(rng, own, *size) if isinstance(own, int) else own
        image = torch.from_numpy(patches(rng, *size)).to(dtype)
        batch.append({"image": image, "instances": make_objects(masks)})
    return batch
