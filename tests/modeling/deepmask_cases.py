"""Small DeepMasks, patches for them, and a hand-made net that finds bright squares."""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from torch import nn

from unseg.config import load_config
from unseg.modeling import DeepMask
from unseg.modeling.proposals import ProposalSettings
from unseg.modeling.proposals.deepmask_geometry import PatchGeometry
from unseg.modeling.proposals.deepmask_losses import DeepMaskLosses

SMALL = {
    "MODEL.META_ARCHITECTURE": "DeepMask",
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_MEAN": [100.0, 110.0, 120.0],
    "MODEL.PIXEL_STD": [60.0, 55.0, 50.0],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.OUT_FEATURES": ["res3"],
    "MODEL.DEEPMASK.IN_FEATURE": "res3",
    "MODEL.DEEPMASK.INPUT_SIZE": 32,
    "MODEL.DEEPMASK.CONTEXT": 16,
    "MODEL.DEEPMASK.OUT_SIZE": 8,
    "MODEL.DEEPMASK.GT_SIZE": 12,
    "MODEL.DEEPMASK.EMBED_DIM": 16,
    "MODEL.DEEPMASK.REDUCE_DIM": 8,
    "MODEL.DEEPMASK.SCORE_HIDDEN": 12,
    "MODEL.DEEPMASK.DROPOUT": 0.0,
    "MODEL.DEEPMASK.TEST.SCALES": [-0.5, 0.0],
}


def config(**changes):
    """SMALL with changes of MODEL.DEEPMASK's keys: ``HEAD="full"``, ``TEST__TOPK=3``."""
    settings = SMALL | {f"MODEL.DEEPMASK.{k.replace('__', '.')}": v for k, v in changes.items()}
    return load_config("", [x for pair in settings.items() for x in pair])


def build(seed=0, **changes):
    """A model of random weights of a size at which every one matters."""
    model = build_model(config(**changes))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = 0.1 if parameter.dim() == 1 else 1.0 / parameter[0].numel() ** 0.5
        parameter.data.normal_(std=spread, generator=generator)
    return model


def patches(labels, seed=0, side=48, mask_side=12):
    """A training input with patches of noise; negatives have masks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    labels = torch.tensor(labels, dtype=torch.int8)
    signs = torch.rand(count, mask_side, mask_side, generator=generator) > 0.6
    masks = (signs.to(torch.int8) * 2 - 1) * (labels > 0)[:, None, None]
    return {
        "file_name": f"{seed}.png",
        "patches": torch.rand(count, 3, side, side, generator=generator) * 255,
        "patch_masks": masks.to(torch.int8),
        "patch_labels": labels,
    }


class BlockMeans(Backbone):
    """The mean of each 8x8 block of pixels, of the first channel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def output_shape(self):
        return {"mean": ShapeSpec(channels=1, stride=8)}

    def forward(self, x):
        self.seen.append(x)
        return {"mean": F.avg_pool2d(x[:, :1], 8)}


class SquareHead(nn.Module):
    """Looks for a bright square of 2x2 cells in the middle of a window of 4x4; a window's mask is
    what is bright in it."""

    cells, out_size = 4, 4

    def __init__(self):
        super().__init__()
        self.asked = []
        pattern = -torch.ones(4, 4)
        pattern[1:3, 1:3] = 1
        self.register_buffer("pattern", pattern)

    def encode(self, features):
        return features

    def scores(self, encoded):
        windows = encoded[:, 0].unfold(1, 4, 1).unfold(2, 4, 1)
        return -(windows - self.pattern).abs().sum(dim=(3, 4))

    def masks(self, encoded, locations):
        self.asked.append(locations)
        return (
            torch.stack(
                [4 * encoded[b, 0, i : i + 4, j : j + 4] - 1 for b, i, j in locations.tolist()]
            )
            if len(locations)
            else encoded.new_zeros(0, 4, 4)
        )


def square_finder(scales=(0.0,), **settings):
    """DeepMask of these: pixel 0 is dark, -1, pixel 255 bright, +1, and grey is 0."""
    return DeepMask(
        backbone=BlockMeans(),
        head=SquareHead(),
        geometry=PatchGeometry(input_size=32, context=0, out_size=4, gt_size=4),
        in_feature="mean",
        losses=DeepMaskLosses(),
        scales=scales,
        inference=ProposalSettings(**settings),
        pixel_mean=[127.5] * 3,
        pixel_std=[127.5] * 3,
    ).eval()


def scene(height, width, boxes):
    """A dark uint8 image with bright boxes, XYXY."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 255
    return image
