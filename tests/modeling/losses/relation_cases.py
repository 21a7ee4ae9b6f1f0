"""Batches of small masks and their relations, worked out by sets of cells."""

import numpy as np
import torch

from unseg.modeling.losses import MaskRelations


def random_masks(rng, count, side=12):
    """Rectangles, pieces of earlier ones and shifted copies: masks of all relations."""
    masks = []
    for _ in range(count):
        kind = rng.integers(4) if masks else 0
        mask = np.zeros((side, side), dtype=bool)
        if kind < 2:
            y, x = rng.integers(0, side - 2, 2)
            height, width = rng.integers(1, side // 2 + 2, 2)
            mask[y : y + height, x : x + width] = True
        elif kind == 2:
            mask = masks[rng.integers(len(masks))] & (rng.random((side, side)) < rng.random())
        else:
            mask = np.roll(masks[rng.integers(len(masks))], rng.integers(0, 3), axis=1)
        masks.append(mask)
    return masks


def cells(mask):
    return {tuple(cell) for cell in np.argwhere(mask)}


def relations_by_sets(masks, min_area=4):
    """What mask_relations has to give for masks on the grid."""
    sets = [cells(mask) for mask in masks]
    n = len(sets)
    iou, containment = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n).double()
    valid = [len(s) >= max(min_area, 1) for s in sets]
    for i in range(n):
        for j in range(n):
            if valid[i] and valid[j]:
                iou[i, j] = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
                containment[i, j] = len(sets[i] & sets[j]) / len(sets[j])
    return MaskRelations(
        valid=torch.tensor(valid, dtype=torch.bool),
        area=torch.tensor([len(s) for s in sets], dtype=torch.int64),
        iou=iou,
        containment=containment,
        image=torch.zeros(n, dtype=torch.int64),
    )


class SmallBatch:
    """Images of masks; `images[k]` lists those of image k, masks are numbered through."""

    def __init__(self, images, min_area=4):
        self.parts = [relations_by_sets(masks, min_area) for masks in images]
        self.sets = [cells(mask) for masks in images for mask in masks]
        self.image = [k for k, masks in enumerate(images) for _ in masks]
        self.valid = [len(s) >= max(min_area, 1) for s in self.sets]

    def __len__(self):
        return len(self.sets)

    def pairs_of_one_image(self):
        for i in range(len(self)):
            for j in range(len(self)):
                if i != j and self.image[i] == self.image[j] and self.valid[i] and self.valid[j]:
                    yield i, j

    def iou(self, i, j):
        return len(self.sets[i] & self.sets[j]) / len(self.sets[i] | self.sets[j])

    def inside(self, part, whole):
        return len(self.sets[part] & self.sets[whole]) / len(self.sets[part])

    def object_pairs(self, min_iou):
        return [p for p in self.pairs_of_one_image() if self.iou(*p) > min_iou]

    def hierarchy_pairs(self, containment, ratio):
        return [
            (i, j)
            for i, j in self.pairs_of_one_image()
            if self.inside(j, i) >= containment
            and len(self.sets[i]) > len(self.sets[j])
            and len(self.sets[i]) / len(self.sets[j]) >= ratio
        ]

    def negatives(self, i, j, max_iou):
        result = []
        for n in range(len(self)):
            if n in (i, j) or not self.valid[n]:
                continue
            if self.image[n] == self.image[i]:
                overlaps = self.iou(i, n) > max_iou
                if overlaps or self.inside(n, i) > 0.5 or self.inside(i, n) > 0.5:
                    continue
            result.append(n)
        return result


def random_batch(seed, most_images=4, most_masks=9, min_area=4):
    rng = np.random.default_rng(seed)
    if rng.random() < 0.3:  # too few for everybody to have a negative
        most_images, most_masks = 1, 4
    images = [
        random_masks(rng, rng.integers(0, most_masks + 1))
        for _ in range(rng.integers(1, most_images + 1))
    ]
    return SmallBatch(images, min_area)


def rich_batch(most_images=3, most_masks=6):
    """The first random batch with triplets of all terms, and with masks that are too small."""
    for seed in range(1000):
        batch = random_batch(seed, most_images, most_masks)
        pairs = batch.object_pairs(0.4), batch.hierarchy_pairs(0.95, 1.1)
        drawable = [any(batch.negatives(*p, 0.1) for p in found) for found in pairs]
        if all(drawable) and not all(batch.valid):
            return batch
    raise LookupError("no such batch")
