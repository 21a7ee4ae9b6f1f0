"""Two views of an image, its masks and their embeddings: what FreeSOLO trains on.

Wang et al., "FreeSOLO: Learning to Segment Objects without Annotations", CVPR 2022.

Legend: N objects, C channels of an annotation's embedding, D channels of the model's embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor

from unseg.data.datasets.video_frames import tight_box
from unseg.data.mappers.instance_mapper import InstanceMapper
from unseg.data.mappers.registry import MAPPERS
from unseg.data.mappers.strong_view import StrongViewSettings, strong_view

_BOXES = ("masks", "xyxy_as_xywh")


@MAPPERS.register()
class TwoViewInstanceMapper(InstanceMapper):
    """:class:`InstanceMapper` that adds a strong view and embeddings to training samples.

    ``image`` is the weak view, as without this class. ``strong_image`` (3, H, W) uint8 is the same
    view after :func:`unseg.data.mappers.strong_view`, so ``instances`` holds for both. The field
    ``gt_embeddings`` (N, D) float32 of ``instances`` is each annotation's ``embedding``, of
    whatever length, resized linearly along its channels; a row of zeros stands for none.
    In testing it is :class:`InstanceMapper`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        embedding_dim: int = 128,
        strong_view_settings: StrongViewSettings | None = None,
        boxes: str = "masks",
        **kwargs: Any,
    ):
        """
        Args:
            is_train: also return the annotations and the strong view.
            embedding_dim: D.
            strong_view_settings: of the strong view; None: there is none.
            boxes: "masks" for the tight boxes of the masks. "xyxy_as_xywh" for an error in
                FreeSOLO's released code: corners (x0, y0, x1, y1) of a mask in the image file are
                read as corner, width and height, so the box reaches to (x0 + x1, y0 + y1).
            kwargs: of :class:`InstanceMapper`.

        Raises:
            ValueError: `boxes` is neither.
        """
        super().__init__(is_train, **kwargs)
        if boxes not in _BOXES:
            raise ValueError(
                f"MODEL.FREESOLO.DATA.BOXES must be one of {', '.join(_BOXES)}, not {boxes!r}"
            )
        self.embedding_dim = embedding_dim
        self.strong_view_settings = strong_view_settings
        self.boxes = boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        solo = cfg.MODEL.FREESOLO
        return super().from_config(cfg, is_train) | {
            "embedding_dim": solo.EMB_DIM,
            "strong_view_settings": (
                StrongViewSettings.from_config(cfg) if solo.DATA.STRONG_VIEW else None
            ),
            "boxes": solo.DATA.BOXES,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: one image in Detectron2's dataset format.

        Returns:
            what :class:`InstanceMapper` gives and, in training, ``strong_image`` and the field
            ``gt_embeddings``.

        Raises:
            ValueError: an embedding is no vector of finite numbers; the message names the image.
                Others as :class:`InstanceMapper`.
        """
        result = super().__call__(dataset_dict)
        if self.is_train and self.strong_view_settings is not None:
            result["strong_image"] = strong_view(
                result["image"], self.strong_view_settings, self.image_format
            )
        return result

    def _add_fields(
        self,
        instances: Instances,
        annotations: Sequence[dict[str, Any]],
        transforms: T.TransformList,
        original_size: tuple[int, int],
    ) -> None:
        embeddings = torch.zeros((len(annotations), self.embedding_dim))
        for row, annotation in zip(embeddings, annotations):
            if annotation.get("embedding") is not None:
                row[:] = _resized(annotation["embedding"], self.embedding_dim)
        instances.gt_embeddings = embeddings
        if self.boxes == "xyxy_as_xywh" and annotations:
            wrong = np.array([_misread_box(a, original_size) for a in annotations])
            instances.gt_boxes = Boxes(transforms.apply_box(wrong).astype(np.float32))
            instances.gt_boxes.clip(instances.image_size)


def _resized(embedding: Any, length: int) -> Tensor:
    """Vector (C,) of any float type as float32 (length,), interpolated linearly, half-pixel."""
    vector = torch.as_tensor(np.asarray(embedding, dtype=np.float64)).float()
    if vector.dim() != 1 or not len(vector):
        raise ValueError(f"an embedding has shape {tuple(vector.shape)}, not (C,)")
    if not vector.isfinite().all():
        raise ValueError("an embedding has numbers that are not finite")
    if len(vector) == length:
        return vector
    return F.interpolate(vector[None, None], size=length, mode="linear", align_corners=False)[0, 0]


def _misread_box(annotation: dict[str, Any], size: tuple[int, int]) -> list[float]:
    """XYXY of the corners of an annotation's mask (of its box, without one) taken for XYWH."""
    if "segmentation" in annotation:
        box, mode = tight_box(annotation["segmentation"], *size), BoxMode.XYWH_ABS
    else:
        box, mode = annotation["bbox"], annotation["bbox_mode"]
    corners = BoxMode.convert(box, mode, BoxMode.XYXY_ABS)
    return BoxMode.convert(corners, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
