"""From images to DeepMask's patches.

Source: Pinheiro et al., "Learning to segment object candidates" (NeurIPS 2015), section 3.

Legend: P patches of an image, w side of the network's input, g side of the target masks.
"""

import copy
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from torch import Tensor

from unseg.data.annotation_stream import AnnotationIndex, uniform_over_categories
from unseg.data.image import read_image
from unseg.data.mappers.registry import MAPPERS
from unseg.data.patches import ImageObjects, Patch, PatchSettings, collect_objects, draw_patches
from unseg.data.square_crop import crop_mask, crop_square

logger = logging.getLogger(__name__)

_SAMPLINGS = ("image", "annotation")
_EVALUATOR = "PatchMaskEvaluator"


@MAPPERS.register()
class DeepMaskPatchMapper:
    """Training patches of an image; in testing the image as it comes.

    In testing, patches are given as well if "PatchMaskEvaluator" is among ``TEST.EVALUATORS``:
    they depend on the image's id alone. Those are of objects of all categories, whatever
    ``CATEGORY_SUBSET`` says, as DeepMask20 is tested on all.

    With ``SAMPLING`` "annotation", :func:`unseg.data.build_train_loader` goes through the
    annotations of :meth:`annotation_index` instead of the images. Images without any then never
    come, and all positives of an item are of its annotation.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        settings: PatchSettings,
        image_format: str = "RGB",
        sampling: str = "image",
        categories: frozenset[int] | None = None,
        with_patches: bool = True,
    ):
        """
        Args:
            is_train: give patches rather than the image.
            settings: of the patches.
            image_format: "RGB" or "BGR".
            sampling: what a training epoch goes through, "image" or "annotation".
            categories: contiguous ids; objects of others do not exist in training, so negatives may
                lie on them. None: there is no other.
            with_patches: in testing, give patches beside the image.

        Raises:
            ValueError: `sampling` is neither.
        """
        if sampling not in _SAMPLINGS:
            raise ValueError(
                f"MODEL.DEEPMASK.DATA.SAMPLING must be image or annotation, not {sampling!r}"
            )
        self.is_train = is_train
        self.settings = settings
        self.image_format = image_format
        self.sampling = sampling
        self.categories = categories if is_train else None
        self.with_patches = with_patches

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        data = cfg.MODEL.DEEPMASK.DATA
        categories = None
        if is_train and len(data.CATEGORY_SUBSET):
            categories = category_ids(data.CATEGORY_SUBSET, cfg.DATASETS.TRAIN)
        return {
            "is_train": is_train,
            "settings": PatchSettings.from_node(cfg.MODEL.DEEPMASK),
            "image_format": cfg.INPUT.FORMAT,
            "sampling": data.SAMPLING,
            "categories": categories,
            "with_patches": _EVALUATOR in cfg.TEST.EVALUATORS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: one image in Detectron2's dataset format; in training it may have
                ``annotation_index``, the annotation that all positives shall show.

        Returns:
            a copy without ``annotations``, with

            - in training, or with `with_patches` if there are ``annotations``: ``patches`` float32
              (P, 3, w, w), pixel values from 0 to 255, 127.5 outside of the image; ``patch_masks``
              int8 (P, g, g), the object's own mask as +1 and -1, all 0 for negatives;
              ``patch_labels`` int8 (P,), +1 and -1; see :func:`unseg.data.patches.draw_patches`;
            - in testing: ``image`` uint8 (3, H, W).

        Raises:
            ImageReadError: the image cannot be read.
            SizeMismatchError: its size is not the one in the dict.
            ValueError: in training ``annotations`` are missing (an empty list is not); an
                annotation has no mask or a malformed one; or ``annotation_index`` is none of a
                usable object.
        """
        dataset_dict = copy.copy(dataset_dict)
        annotations = dataset_dict.pop("annotations", None)
        chosen = dataset_dict.pop("annotation_index", None)
        pixels = read_image(dataset_dict["file_name"], self.image_format)
        detection_utils.check_image_size(dataset_dict, pixels)
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        if not self.is_train:
            dataset_dict["image"] = image
        # The images of unseg.tools.export_proposals come without annotations, and want no patches.
        if self.is_train or (self.with_patches and annotations is not None):
            rng = self._generator(dataset_dict.get("image_id"))
            try:
                dataset_dict |= self._patches(image, annotations, chosen, rng)
            except ValueError as error:
                raise ValueError(f"{dataset_dict['file_name']}: {error}") from error
        return dataset_dict

    def annotation_index(self, dicts: Sequence[dict[str, Any]]) -> AnnotationIndex | None:
        """What an epoch goes through if it is not the images.

        Only annotations that can be positives count, for the categories, too: no crowds, no small
        objects, none outside of the subset of categories.

        Args:
            dicts: of the training data, with sizes.

        Returns:
            the index for ``SAMPLING`` "annotation", None for "image".

        Raises:
            ValueError: no annotation is usable, or one is malformed.
        """
        if self.sampling == "image":
            return None
        # Polygons are rasterised to see their size: minutes for a data set as large as COCO.
        logger.info("Looking for usable annotations in %d images", len(dicts))
        images, numbers, categories = [], [], []
        for i, record in enumerate(dicts):
            annotations = record.get("annotations", [])
            size = (record["height"], record["width"])
            try:
                objects = collect_objects(annotations, size, self.settings, self.categories)
            except ValueError as error:
                raise ValueError(f"{record['file_name']}: {error}") from error
            for number in objects.numbers[objects.usable].tolist():
                images.append(i)
                numbers.append(number)
                categories.append(annotations[number]["category_id"])
        if not images:
            raise ValueError(
                "MODEL.DEEPMASK.DATA.SAMPLING annotation: the training data have no usable one "
                "(see CATEGORY_SUBSET, MIN_AREA and MIN_SIDE)"
            )
        logger.info("%d annotations in %d images are usable", len(images), len(set(images)))
        return uniform_over_categories(images, numbers, categories)

    def _generator(self, image_id: Any) -> np.random.Generator:
        """Seeded from the draw in training, from the image in testing."""
        if self.is_train:
            return np.random.default_rng(np.random.randint(0, 2**32, 4, dtype=np.uint32))
        digest = hashlib.sha256(str(image_id).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))

    def _patches(
        self,
        image: Tensor,
        annotations: list[dict[str, Any]] | None,
        chosen: int | None,
        rng: np.random.Generator,
    ) -> dict[str, Tensor]:
        """The three tensors of patches."""
        if annotations is None:
            raise ValueError("DeepMaskPatchMapper needs 'annotations' for patches")
        size = (image.shape[1], image.shape[2])
        objects = collect_objects(annotations, size, self.settings, self.categories)
        target = None if chosen is None else _index_of(objects, chosen)
        patches = draw_patches(objects, self.settings, rng, target)
        return cut_patches(image, objects, patches, self.settings)


def cut_patches(
    image: Tensor, objects: ImageObjects, patches: Sequence[Patch], settings: PatchSettings
) -> dict[str, Tensor]:
    """Cut patches and their targets out of an image.

    Args:
        image: (3, H, W).
        objects: of the image.
        patches: P of them.
        settings: has the sizes.

    Returns:
        ``patches``, ``patch_masks`` and ``patch_labels`` of :class:`DeepMaskPatchMapper`.
    """
    side, ratio = settings.gt_size, settings.input_size / settings.window
    pixels = torch.empty((len(patches), len(image), settings.window, settings.window))
    masks = torch.zeros((len(patches), side, side), dtype=torch.int8)
    labels = torch.full((len(patches),), -1, dtype=torch.int8)
    for n, patch in enumerate(patches):
        crop = crop_square(image, patch.square, settings.window)
        pixels[n] = crop.flip(-1) if patch.flip else crop
        if patch.target < 0:
            continue
        labels[n] = 1
        mask = crop_mask(objects.masks[patch.target], patch.square.concentric_box(ratio), side)
        masks[n] = 2 * (mask.flip(-1) if patch.flip else mask).to(torch.int8) - 1
    return {"patches": pixels, "patch_masks": masks, "patch_labels": labels}


def category_ids(names: Sequence[str], datasets: Sequence[str]) -> frozenset[int]:
    """Contiguous ids of categories, which have to be the same in all data sets.

    Args:
        names: categories by name, ``CATEGORY_SUBSET``.
        datasets: names of registered data sets. One that does not say its categories before it is
            loaded is loaded.

    Raises:
        ValueError: a data set lacks a category (the message lists those that it has), or two
            number their categories differently.
    """
    found = set()
    for dataset in datasets:
        if not MetadataCatalog.get(dataset).get("thing_classes"):
            DatasetCatalog.get(dataset)
        known = list(MetadataCatalog.get(dataset).get("thing_classes", []))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"MODEL.DEEPMASK.DATA.CATEGORY_SUBSET: {dataset} has no {unknown}; it has {known}"
            )
        found.add(frozenset(known.index(name) for name in names))
    if len(found) > 1:
        raise ValueError(
            "MODEL.DEEPMASK.DATA.CATEGORY_SUBSET: these data sets number their categories "
            f"differently: {', '.join(datasets)}"
        )
    return found.pop() if found else frozenset()


def _index_of(objects: ImageObjects, number: int) -> int:
    """Which object an annotation is."""
    matches = np.flatnonzero((objects.numbers == number) & objects.usable)
    if not len(matches):
        raise ValueError(f"annotation_index {number} is no usable object of this image")
    return int(matches[0])
