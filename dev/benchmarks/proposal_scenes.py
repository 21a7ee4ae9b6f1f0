"""Objects and proposals made of ellipses, in the forms that evaluators take, and how
much of everything proposals.py does."""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import BoxMode, Instances
from measuring import draw_boxes
from pycocotools import mask as mask_util

from unseg.structures import RLE


@dataclass(frozen=True)
class Sizes:
    """How much is done; the defaults are what the goals are about."""

    rounds: int = 5
    map_size: tuple[int, int] = (75, 100)
    windows: tuple[int, ...] = (256, 1000)
    k: int = 5
    m: int = 21
    images: int = 500
    scenes: int = 25
    image_size: tuple[int, int] = (480, 640)
    proposals: int = 1000
    input_images: int = 3
    sampled_windows: int = 16
    head_channels: int = 512
    head_cells: int = 14
    head_windows: int = 100
    head_patches: int = 32


QUICK = Sizes(
    rounds=1,
    map_size=(20, 30),
    windows=(16,),
    images=6,
    scenes=3,
    image_size=(96, 128),
    proposals=40,
    sampled_windows=2,
    head_channels=8,
    head_cells=4,
    head_windows=5,
    head_patches=2,
)


@dataclass(frozen=True)
class Scene:
    """Objects and proposals of an image, boxes float XYXY that the ellipses fill."""

    object_boxes: np.ndarray
    objects: list[RLE]
    boxes: np.ndarray
    masks: list[RLE]


def ellipse_rles(boxes: np.ndarray, size: tuple[int, int]) -> list[RLE]:
    """Run lengths of the ellipses in boxes (N, 4) XYXY, straight from the formula.

    In each column the pixels whose centres are inside; boxes are less than an image high.
    """
    height, width = size
    rles = []
    for x0, y0, x1, y1 in boxes.tolist():
        cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
        columns = np.arange(max(int(x0), 0), min(int(np.ceil(x1)), width))
        half = ry * np.sqrt(np.clip(1 - ((columns + 0.5 - cx) / rx) ** 2, 0, None))
        top = np.clip(np.ceil(cy - half - 0.5), 0, height).astype(int)
        bottom = np.clip(np.floor(cy + half - 0.5) + 1, 0, height).astype(int)
        some = bottom > top
        edges = np.stack([columns * height + top, columns * height + bottom], axis=1)[some].ravel()
        runs = np.diff(np.concatenate(([0], edges, [height * width]))).tolist()
        rles.append(mask_util.frPyObjects({"size": list(size), "counts": runs}, height, width))
    return rles


def make_scene(seed: int, size: tuple[int, int], proposals: int) -> Scene:
    """Reproducible; see the top of this file."""
    rng = np.random.default_rng(seed)
    objects = draw_boxes(1 + rng.poisson(6), size, whole=False, seed=seed).astype(float)
    near = objects[rng.integers(0, len(objects), 3 * proposals // 5)]
    side = near[:, 2:] - near[:, :2]
    centers = (near[:, 2:] + near[:, :2]) / 2 + side * rng.normal(0, 0.15, side.shape)
    side = side * np.exp(rng.normal(0, 0.25, side.shape))
    near = np.concatenate([centers - side / 2, centers + side / 2], axis=1)
    others = draw_boxes(proposals - len(near), size, whole=False, seed=seed + 10**6).astype(float)
    boxes = np.concatenate([near, others])
    for some in (objects, boxes):  # at least two pixels, and lower than the image
        highest = np.array([size[1], size[0]]) * 0.98
        sides = np.clip(some[:, 2:] - some[:, :2], 2, highest)
        middle = np.clip(
            (some[:, 2:] + some[:, :2]) / 2, sides / 2, np.array(size)[::-1] - sides / 2
        )
        some[:, :2], some[:, 2:] = middle - sides / 2, middle + sides / 2
    return Scene(objects, ellipse_rles(objects, size), boxes, ellipse_rles(boxes, size))


def make_scores(image: int, count: int) -> np.ndarray:
    """In random order, no two equal: float32 (count,)."""
    order = np.random.default_rng(image + 2 * 10**6).permutation(count)
    return ((order + 0.5) / count).astype(np.float32)


def dataset_dicts(scenes: list[Scene], images: int, size: tuple[int, int]) -> list[dict]:
    """Detectron2's form of the ground truth, ids from 1."""
    dicts = []
    for image in range(images):
        scene = scenes[image % len(scenes)]
        annotations = [
            {
                "bbox": mask_util.toBbox(rle).tolist(),
                "bbox_mode": BoxMode.XYWH_ABS,
                "segmentation": rle,
                "area": float(mask_util.area(rle)),
                "category_id": 0,
                "iscrowd": 0,
            }
            for rle in scene.objects
        ]
        record = {"image_id": image + 1, "height": size[0], "width": size[1]}
        dicts.append(record | {"annotations": annotations})
    return dicts


def as_coco(dicts: list[dict]) -> dict:
    """The same as the content of a COCO file."""
    annotations = [
        {key: a[key] for key in ("bbox", "segmentation", "area", "iscrowd")}
        | {"image_id": record["image_id"], "category_id": 1}
        for record in dicts
        for a in record["annotations"]
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    images = [{"id": d["image_id"], "height": d["height"], "width": d["width"]} for d in dicts]
    categories = [{"id": 1, "name": "object"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def as_results(scenes: list[Scene], images: int) -> list[dict]:
    """COCO's result dicts."""
    return [
        {
            "image_id": image + 1,
            "category_id": 1,
            "score": score,
            "segmentation": rle,
        }
        for image in range(images)
        for scene in [scenes[image % len(scenes)]]
        for score, rle in zip(make_scores(image, len(scene.masks)).tolist(), scene.masks)
    ]


def as_output(masks: object, image: int, count: int, size: tuple[int, int]) -> dict:
    """A model's output."""
    instances = Instances(size)
    instances.scores = torch.from_numpy(make_scores(image, count))
    instances.pred_masks = masks
    return {"instances": instances}
