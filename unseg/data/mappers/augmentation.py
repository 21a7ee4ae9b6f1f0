"""Detectron2's augmentations of ``cfg.INPUT``, made safe for images of any shape."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but no side of the result is 0: a 1 x 3000 image shrinks to 1 x 1333."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h = max(transform.new_h, 1)
            transform.new_w = max(transform.new_w, 1)
        return transform


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
    """Crop (in training, if ``INPUT.CROP`` is enabled), resize and flip."""
    augmentations = detection_utils.build_augmentation(cfg, is_train)
    result = [
        ResizeShortestEdge(a.short_edge_length, a.max_size, a.sample_style, a.interp)
        if isinstance(a, T.ResizeShortestEdge)
        else a
        for a in augmentations
    ]
    if cfg.INPUT.CROP.ENABLED and is_train:
        result.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return result
