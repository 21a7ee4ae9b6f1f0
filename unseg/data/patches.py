"""DeepMask's training patches: which squares of an image, and which object each one shows.

Source: Pinheiro et al., "Learning to segment object candidates" (NeurIPS 2015), section 3.1 and
3.3. A patch is positive if an object is in its canonical place in it (centred, and of one size),
up to a jitter; negative if every object is far from that place in shift or in scale. Others are
not used.

Legend: N objects, P patches, H W image. Coordinates: pixel p covers [p, p + 1), boxes are XYXY. A
patch of scale s is what a square of INPUT_SIZE (with the context: INPUT_SIZE + CONTEXT) pixels
shows of the image resized by 2^-s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from pycocotools import mask as mask_util

from unseg.data.square_crop import Square, mask_at
from unseg.discovery.rle import parse_segmentation, read_segmentation
from unseg.structures import RLE, CanonicalRule, canonical_places, label_windows
from unseg.structures.canonical import NEGATIVE

# Windows drawn for each negative patch before an image counts as one without room for it.
_TRIES = 25


def canonical_object_size(input_size: int, object_size: int = 0) -> int:
    """Longest side of an object that fits a patch: `object_size`, or 128 / 224 of `input_size`."""
    return object_size or -(-input_size * 128 // 224)


@dataclass(frozen=True)
class PatchSettings:
    """What ``cfg.MODEL.DEEPMASK`` says of patches; its comments describe the keys.

    Attributes:
        rule: distances of positives and negatives from an object's canonical place.
        scales: least and greatest scale of the windows of test time, which negatives are drawn
            from: the test pyramid's exponents with the sign turned.
    """

    rule: CanonicalRule
    input_size: int = 160
    context: int = 32
    gt_size: int = 112
    patches_per_image: int = 4
    min_area: float = 100
    min_side: float = 5
    scales: tuple[float, float] = (-0.5, 2.5)

    def __post_init__(self) -> None:
        if self.patches_per_image < 2 or self.patches_per_image % 2:
            raise ValueError(
                "MODEL.DEEPMASK.DATA.PATCHES_PER_IMAGE must be even and at least 2 (half of them "
                f"are positive), not {self.patches_per_image}"
            )
        if min(self.input_size, self.gt_size) < 1 or self.context < 0:
            raise ValueError(
                "MODEL.DEEPMASK.INPUT_SIZE and GT_SIZE must be positive and CONTEXT not negative, "
                f"not {self.input_size}, {self.gt_size} and {self.context}"
            )

    @classmethod
    def from_node(cls, node: CfgNode) -> "PatchSettings":
        """From ``cfg.MODEL.DEEPMASK``.

        Raises:
            ValueError: a setting is out of range; the message names the key.
        """
        data = node.DATA
        if not len(node.TEST.SCALES):
            raise ValueError("MODEL.DEEPMASK.TEST.SCALES is empty")
        try:
            rule = CanonicalRule(
                canonical_object_size(node.INPUT_SIZE, node.OBJECT_SIZE),
                data.JITTER_SHIFT,
                data.JITTER_SCALE,
                data.NEG_SHIFT,
                data.NEG_SCALE,
            )
        except ValueError as error:
            raise ValueError(
                "MODEL.DEEPMASK.OBJECT_SIZE, DATA.JITTER_SHIFT, JITTER_SCALE, NEG_SHIFT, "
                f"NEG_SCALE: {error}"
            ) from error
        return cls(
            rule=rule,
            input_size=node.INPUT_SIZE,
            context=node.CONTEXT,
            gt_size=node.GT_SIZE,
            patches_per_image=data.PATCHES_PER_IMAGE,
            min_area=data.MIN_AREA,
            min_side=data.MIN_SIDE,
            scales=(-max(node.TEST.SCALES), -min(node.TEST.SCALES)),
        )

    @property
    def window(self) -> int:
        """Side of the network's input."""
        return self.input_size + self.context


@dataclass(frozen=True)
class ImageObjects:
    """The objects of an image; those with an empty mask are left out.

    Attributes:
        size: (H, W).
        boxes: float64 (N, 4), tight boxes of the masks.
        masks: N run-length encodings.
        usable: bool (N,), large enough to be positives.
        numbers: int64 (N,), which annotation each one is.
        crowd: mask of all crowds together, or None.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    masks: list[RLE]
    usable: np.ndarray
    numbers: np.ndarray
    crowd: RLE | None


@dataclass(frozen=True)
class Patch:
    """One patch.

    Attributes:
        square: what the network sees, with the context.
        target: index of the object that the patch shows; -1: it is negative.
        flip: mirror it.
    """

    square: Square
    target: int
    flip: bool


def collect_objects(
    annotations: Sequence[dict[str, Any]],
    size: tuple[int, int],
    settings: PatchSettings,
    categories: frozenset[int] | None = None,
) -> ImageObjects:
    """Check the annotations of an image and sort them.

    Boxes are those of the masks, as in :class:`unseg.data.mappers.InstanceMapper`.

    Args:
        annotations: in Detectron2's form; ``segmentation`` holds polygons or a run-length encoding.
        size: (H, W) of the image.
        settings: says which objects are large enough.
        categories: objects (and crowds) of others do not exist; None: there is no other.

    Raises:
        ValueError: an annotation has no mask, or a malformed one.
    """
    masks, numbers, crowds = [], [], []
    for number, annotation in enumerate(annotations):
        if categories is not None and annotation["category_id"] not in categories:
            continue
        if not annotation.get("segmentation"):
            raise ValueError(f"annotation {number} has no segmentation")
        try:
            rle = _parse(annotation["segmentation"], *size)
        except ValueError as error:
            raise ValueError(f"annotation {number}: {error}") from error
        if annotation.get("iscrowd", 0):
            crowds.append(rle)
        elif mask_util.area(rle):
            masks.append(rle)
            numbers.append(number)
    boxes = mask_util.toBbox(masks).reshape(-1, 4) if masks else np.zeros((0, 4))
    areas = mask_util.area(masks) if masks else np.zeros(0)
    usable = (areas >= settings.min_area) & (boxes[:, 2:].min(axis=1) >= settings.min_side)
    boxes[:, 2:] += boxes[:, :2]
    crowd = mask_util.merge(crowds) if crowds else None
    return ImageObjects(size, boxes, masks, usable, np.array(numbers, np.int64), crowd)


def _parse(segmentation: Any, height: int, width: int) -> RLE:
    # Of the two, only encodings from a file may be malformed, and to check them takes the longest.
    parse = read_segmentation if isinstance(segmentation, list) else parse_segmentation
    return parse(segmentation, height, width)


def draw_patches(
    objects: ImageObjects,
    settings: PatchSettings,
    rng: np.random.Generator,
    target: int | None = None,
) -> list[Patch]:
    """Draw the patches of an image: as many positives as negatives, in this order.

    Without usable objects all are negative. If an image has no room for a negative (none of
    :data:`_TRIES` windows for each was one), a positive takes its place. If it has no usable object
    either, the patch is wholly outside of the image, plain grey: certainly negative. So there are
    always P patches, and none has a wrong label.

    Args:
        objects: of the image.
        settings: see :class:`PatchSettings`.
        rng: all that the result depends on besides.
        target: index of the usable object that all positives show; None: all usable ones take
            turns, in random order.

    Returns:
        P patches.
    """
    count = settings.patches_per_image
    sources = np.flatnonzero(objects.usable) if target is None else np.array([target])
    room = count // 2 if len(sources) else count
    negatives = draw_negatives(objects, settings, rng, room)
    targets = _take_turns(sources, count - len(negatives), rng) if len(sources) else []
    squares = [(draw_positive(objects.boxes[t], settings, rng), int(t)) for t in targets]
    squares += [(square, -1) for square in negatives]
    outside = Square(objects.size[1], objects.size[0], settings.window)
    squares += [(outside, -1)] * (count - len(squares))
    return [Patch(square, t, bool(rng.random() < 0.5)) for square, t in squares]


def _take_turns(sources: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the sources: each comes again only after all others have come."""
    rounds = -(-count // len(sources))
    return np.concatenate([rng.permutation(sources) for _ in range(rounds)])[:count]


def draw_positive(box: np.ndarray, settings: PatchSettings, rng: np.random.Generator) -> Square:
    """A square that shows an object in its canonical place, jittered in scale and shift.

    Scale by U(-JITTER_SCALE, JITTER_SCALE) octaves, then the centre by U(-JITTER_SHIFT,
    JITTER_SHIFT) pixels of the patch along each axis. The corners are rounded to whole pixels of
    the image, which for small objects may be several of the patch; the target's square is rounded
    alike.

    Args:
        box: float64 (4,) of the object.
        settings: see :class:`PatchSettings`.
        rng: three numbers are drawn.
    """
    rule = settings.rule
    centers, scales = canonical_places(torch.from_numpy(box)[None], rule.object_size)
    octaves, *shift = rng.uniform(-1, 1, 3).tolist()
    factor = 2 ** (float(scales[0]) + octaves * rule.pos_scale)
    x, y = (c + s * rule.pos_shift * factor for c, s in zip(centers[0].tolist(), shift))
    return Square.around(x, y, settings.window * factor)


def draw_negatives(
    objects: ImageObjects, settings: PatchSettings, rng: np.random.Generator, count: int
) -> list[Square]:
    """Squares that show no object in its canonical place, by the paper's rule.

    Every object, however small, is at least NEG_SHIFT pixels of the patch away along an axis, or
    NEG_SCALE octaves away; parts of objects, or whole ones, may be in the patch. The paper does not
    say how negatives are distributed. Ours are what the network has to reject in testing: scales
    uniform over the test pyramid's, centres uniform in the image. Nor does it say what to do about
    crowds, which hold objects whose places are not annotated: no negative is centred in one.

    The rule is applied to the squares of whole pixels, as they are cut out.

    Args:
        objects: of the image.
        settings: see :class:`PatchSettings`.
        rng: ``3 * 25 * count`` numbers are drawn.
        count: how many are wanted.

    Returns:
        up to `count` squares: fewer if not enough of the windows drawn are negative.
    """
    height, width = objects.size
    low, high = (0, 0, settings.scales[0]), (width, height, settings.scales[1])
    drawn = rng.uniform(low, high, (_TRIES * count, 3)).tolist()
    squares = [Square.around(x, y, settings.window * 2**scale) for x, y, scale in drawn]
    centers = np.array([square.center for square in squares]).reshape(-1, 2)
    scales = np.array([math.log2(square.side / settings.window) for square in squares])
    labels, _ = label_windows(
        torch.from_numpy(centers),
        torch.from_numpy(scales),
        torch.from_numpy(objects.boxes),
        settings.rule,
    )
    good = labels.numpy() == NEGATIVE
    if objects.crowd is not None:
        columns, rows = np.floor(centers).astype(np.int64).T
        good &= ~mask_at(objects.crowd, columns.clip(0, width - 1), rows.clip(0, height - 1))
    return [squares[i] for i in np.flatnonzero(good)[:count]]
