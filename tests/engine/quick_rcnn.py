"""A detector that trains and is evaluated in seconds, and scenes for it."""

from pathlib import Path

import torch

from unseg.discovery import write_pseudo_masks
from unseg.structures import ImageRecord, make_pseudo_masks

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "projects/FreeSOLO/configs/pseudo_mask_rcnn_tiny.yaml"

# Small images, narrow heads and few proposals, so that it takes seconds.
QUICK = {
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
}


def write_scenes(folder, split, count):
    """Squares on the first synthetic scenes, as ``x.json@unseg-synthetic://split``.

    They are so many that an untrained detector finds some of them.
    """
    places = [
        (y, x, size)
        for size in (30, 60, 120)
        for y in range(0, 161 - size, size // 2)
        for x in range(0, 161 - size, size // 2)
    ]
    masks = torch.zeros((len(places), 160, 160), dtype=torch.bool)
    for mask, (y, x, size) in zip(masks, places, strict=True):
        mask[y : y + size, x : x + size] = True
    squares = make_pseudo_masks(masks, torch.ones(len(places)))
    records = [ImageRecord(f"{i:06d}.bmp", 160, 160, i, squares) for i in range(count)]
    write_pseudo_masks(folder / f"{split}.json", records)
    return f"{folder}/{split}.json@unseg-synthetic://{split}"
