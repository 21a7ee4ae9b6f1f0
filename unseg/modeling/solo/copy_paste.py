"""Copy-paste augmentation on the device: objects of one image into another, in the training step.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation",
CVPR 2021, in the form that FreeSOLO uses: from the weak view of one image of the batch into the
strong view of another, the whole source stretched to the target's size.

Legend: B images, H W pixels of a target, h w of its source, N objects of a target, M of its source,
K objects chosen among these.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from unseg.layers import mask_iou, pack_masks

# Masks are stretched as floats, so many at a time.
_CHUNK = 32


@torch.no_grad()
def copy_paste(
    images: Tensor | Sequence[Tensor],
    targets: Sequence[Instances],
    source_images: Tensor | Sequence[Tensor],
    source_targets: Sequence[Instances],
    *,
    max_overlap: float = 0.5,
    compat: bool = False,
) -> tuple[list[Tensor], list[Instances]]:
    """Paste random objects of source b into image b. For FreeSOLO, the sources are the weak views
    in reversed order of the batch.

    Of the M objects of a source, 0 to M (uniformly) are chosen, all alike. One that covers at least
    `max_overlap` of an object of the target, or that vanishes when stretched, is left out. The rest
    are pasted at once, as one region with the source's pixels: they are cut out of the target's
    objects, whose order they follow, and those left without a pixel are dropped. Among each other
    pasted objects keep their masks, which may overlap if they do in the source. Boxes become tight
    ones. An image into which nothing is pasted keeps its boxes, masks and pixels.

    Random numbers come from torch's global CPU generator. On a GPU the host waits once per image,
    for the number of objects. Nothing given is changed, but results may share its memory.

    Args:
        images: B times (3, H, W), uint8 or floating; sizes may differ within a list.
        targets: their objects, with ``gt_masks`` (BitMasks) of H x W pixels on the same device.
        source_images: B times (3, h, w), of any size and dtype on the same device.
        source_targets: their objects, with the same fields, tensors or what Detectron2 can
            concatenate. All fields but ``gt_masks`` and ``gt_boxes`` go along as they are.
        max_overlap: see above; a part of the target's object, 0 to 1.
        compat: repeat a flaw of FreeSOLO's released code: objects pasted into an image without any
            keep their boxes, which are those in the source before it is stretched.

    Returns:
        B images of the shapes and dtypes of `images`, and B times their objects.

    Raises:
        ValueError: unequal numbers of images and objects' lists, masks of another size than their
            image, no ``gt_masks``, or fields that a target has and its source has not or vice
            versa.
    """
    numbers = len(images), len(targets), len(source_images), len(source_targets)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"images, targets, source_images, source_targets: their numbers differ: {numbers}"
        )
    pasted_images, pasted_targets = [], []
    for image, target, source_image, source in zip(images, targets, source_images, source_targets):
        _check(image, target, "targets")
        _check(source_image, source, "source_targets")
        _check_fields(target, source)
        chosen = _choose(len(source))
        if len(chosen):
            objects = _stretched(source[chosen.to(image.device)], target.image_size)
            image, target = _paste(image, target, source_image, objects, max_overlap, compat)
        pasted_images.append(image)
        pasted_targets.append(target)
    return pasted_images, pasted_targets


def _check(image: Tensor, objects: Instances, name: str) -> None:
    if not objects.has("gt_masks"):
        raise ValueError(f"{name} have no field gt_masks")
    masks = objects.gt_masks.tensor
    if not masks.shape[1:] == image.shape[1:] == tuple(objects.image_size):
        raise ValueError(
            f"{name}: masks {tuple(masks.shape)} and image_size {tuple(objects.image_size)} do not "
            f"fit an image {tuple(image.shape)}"
        )


def _check_fields(target: Instances, source: Instances) -> None:
    fields, others = sorted(target.get_fields()), sorted(source.get_fields())
    if fields != others:
        raise ValueError(f"targets have the fields {fields}, their source_targets {others}")


def _choose(count: int) -> Tensor:
    """Indices (K,), in random order, of 0 <= K <= count objects."""
    wanted = int(torch.randint(count + 1, ()))  # on the CPU: nothing waits
    return torch.randperm(count)[:wanted]


def _stretch(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (C, h, w) of any dtype, bilinearly resized to float32 (C, H, W)."""
    x = x.float()
    if x.shape[1:] == size:
        return x
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def _stretched(objects: Instances, size: tuple[int, int]) -> Instances:
    """The same objects with masks for an image of `size`; boxes and all else stay."""
    masks = objects.gt_masks.tensor
    masks = torch.cat([_stretch(part, size) >= 0.5 for part in masks.split(_CHUNK)])
    return _with_masks(objects, masks)


def _with_masks(objects: Instances, masks: Tensor) -> Instances:
    """The same objects with other masks, which may be of another size."""
    result = Instances(tuple(masks.shape[1:]), **objects.get_fields())
    result.gt_masks = BitMasks(masks)
    return result


def _stretched_image(image: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    stretched = _stretch(image, size)
    return (stretched if dtype.is_floating_point else stretched.round()).to(dtype)


def _accepted(pasted: Tensor, masks: Tensor, max_overlap: float) -> Tensor:
    """Which of the masks (K, H, W) to paste onto masks (N, H, W); bool (K,)."""
    packed, existing = pack_masks(pasted), pack_masks(masks)
    shared = mask_iou(packed, existing, mode="inter")
    # The exact quotient: a float32 overlap may miss its own threshold.
    covered = shared.double() / existing.area.clamp(min=1)
    return (packed.area > 0) & (covered < max_overlap).all(dim=1)


def _paste(
    image: Tensor,
    target: Instances,
    source_image: Tensor,
    objects: Instances,
    max_overlap: float,
    compat: bool,
) -> tuple[Tensor, Instances]:
    """Image and objects after pasting those of `objects` (K > 0) that may be."""
    masks, pasted = target.gt_masks.tensor, objects.gt_masks.tensor
    accepted = _accepted(pasted, masks, max_overlap)
    region = (pasted & accepted[:, None, None]).any(dim=0)
    result = Instances.cat([_with_masks(target, masks & ~region), objects])
    packed = pack_masks(result.gt_masks.tensor)
    if result.has("gt_boxes") and not (compat and len(target) == 0):
        # Where nothing is accepted, boxes that are not tight stay so.
        boxes = torch.where(accepted.any(), packed.box.float(), result.gt_boxes.tensor)
        result.gt_boxes = Boxes(boxes)
    kept = packed.area > 0
    kept[len(target) :] &= accepted
    source_pixels = _stretched_image(source_image, target.image_size, image.dtype)
    # Indices, not bools: the host waits once, not for each field.
    return torch.where(region, source_pixels, image), result[kept.nonzero()[:, 0]]
