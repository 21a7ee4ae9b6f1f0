"""Measures one embedding head; what long_tail.py runs after each training.

    python dev/experiments/long_tail_measures.py --config-file CONFIG --data NAME --write x.json
        [KEY VALUE ...]

The data set is a synthetic one of the style "parts": objects and their parts are annotated alike.

Of the detections (all clustered together, K as the config says), in percent:
* AP, AP50, APr, APc, APf: masks as LVIS measures them, clusters named by majority on the other half
  of the images (ClusterLVISEvaluator); named, dropped.
* of those that match an annotation (mask IoU of .5 or more): NMI, ACC and purity of their clusters
  with the annotations' classes; recall, recall f/c/r: mean over the classes of all groups of the
  share of its items whose cluster is mostly of the class. "k-means NMI": the same of scikit-learn's
  k-means on the tangents, whatever the geometry is; "matched", their number.
Of the annotations, embedded with their own masks, in percent:
* gt NMI: of their clusters, K as above; gt kNN: the nearest other annotation has the same class.
* wholes inside: an object is nearer to the origin than a part of it.
* fg inside: an object's window is nearer to its foreground than to its background.
* same instance: among all annotations' copies, boxes and masks moved by a tenth of their sides, the
  nearest to an annotation is its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write_whole

import unseg  # noqa: F401 (registers the data sets; before detectron2, whose import warns)

# isort: split
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from unseg.checkpoint import SafeCheckpointer
from unseg.config import load_config
from unseg.data import build_test_loader
from unseg.engine.embedded_objects import annotated_objects, decode_masks
from unseg.evaluation import ClusterLVISEvaluator
from unseg.evaluation.cluster_detections import Detections
from unseg.evaluation.cluster_metrics import (
    clustering_accuracy,
    distances,
    hierarchy_accuracy,
    knn_accuracy,
    macro_recall,
    majority_classes,
    normalized_mutual_information,
    purity,
)
from unseg.evaluation.clustering import ClusterSettings
from unseg.geometry import tangent_dist
from unseg.modeling.roi_heads.regions import VIEWS, Regions

SHIFT = 0.1  # of a copy, as a share of the box's sides
Numbers = dict[str, float]


class MeasuringEvaluator(ClusterLVISEvaluator):
    """Keeps what has been clustered, so that it is matched with the annotations once."""

    found: Detections

    def _score(self, found: Detections, tasks: Any) -> dict[str, Numbers]:
        self.found = found
        return super()._score(found, tasks)


def measure_detections(cfg: CfgNode, model: nn.Module, data: str) -> Numbers:
    """What is measured of the detections."""
    evaluator = MeasuringEvaluator(cfg, data)
    for inputs in build_test_loader(cfg, data):
        with torch.no_grad():
            evaluator.process(inputs, model(inputs))
    scores = evaluator.evaluate()
    numbers = {key: scores["cluster_segm"][key] for key in ("AP", "AP50", "APr", "APc", "APf")}
    numbers |= {key: scores["clusters"][key] for key in ("named", "dropped")}
    found = evaluator.found
    matched = found.classes >= 0
    clusters, classes = found.clusters[matched], found.classes[matched]
    groups = MetadataCatalog.get(data).thing_frequencies
    recall = macro_recall(majority_classes(clusters, classes), classes, groups)
    numbers["NMI"] = 100 * normalized_mutual_information(clusters, classes)
    numbers["ACC"] = 100 * clustering_accuracy(clusters, classes)
    numbers["purity"] = 100 * purity(clusters, classes)
    numbers["recall"] = 100 * recall["all"]
    numbers |= {f"recall {group}": 100 * recall[group] for group in "fcr"}
    anchor = clustering_of(cfg, CENTROID="kmeans")(found.tangents)[matched]
    numbers["k-means NMI"] = 100 * normalized_mutual_information(anchor, classes)
    return numbers | {"matched": float(matched.sum()), "detections": float(len(matched))}


def clustering_of(cfg: CfgNode, **changed: Any) -> Callable[[Tensor], np.ndarray]:
    """The config's clustering, with some of its keys changed."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.HIERARCHICAL_EMBEDDING.CLUSTERING.update(changed)
    return ClusterSettings.from_cfg(cfg)


class Annotated:
    """The annotations' tangents by view, of their moved copies ("copy"), their classes and pairs.

    Attributes:
        tangents: by name float32 (N, D).
        classes: int64 (N,).
        pairs: int64 (T, 2), rows of a whole and its part.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, data: str):
        annotations = {x["image_id"]: x["annotations"] for x in DatasetCatalog.get(data)}
        parts: dict[str, list[Tensor]] = {name: [] for name in (*VIEWS, "copy")}
        classes, pairs, rows = [], [], 0
        for inputs in build_test_loader(cfg, data):
            for x in inputs:
                own = annotations[x["image_id"]]
                for name, tangents in embed_views(model, x, own).items():
                    parts[name].append(tangents)
                classes += [a["category_id"] for a in own]
                pairs += [
                    (rows + a["parent"], rows + n)
                    for n, a in enumerate(own)
                    if a["parent"] is not None
                ]
                rows += len(own)
        self.tangents = {name: torch.cat(some) for name, some in parts.items()}
        self.classes = np.array(classes)
        self.pairs = torch.tensor(pairs)


@torch.no_grad()
def embed_views(model: nn.Module, x: dict[str, Any], annotations: list) -> dict[str, Tensor]:
    """Tangents of an image's annotations and of their copies; images are not resized."""
    size = (x["height"], x["width"])
    objects, left_out = annotated_objects(annotations, size)
    images = model.preprocess_image([x])
    if left_out or tuple(images.image_sizes[0]) != size:
        raise RuntimeError(f"{x['file_name']}: annotations without pixels, or a resized image")
    features, boxes = model.backbone(images.tensor), torch.from_numpy(objects.boxes)
    masks = decode_masks(objects.masks, *size)
    heads = model.roi_heads
    with heads.showing(images):
        regions = Regions(features, [boxes], [masks.float()], [size], True, images)
        views = heads.embedding_head(regions, VIEWS)
    moved = [move(box, mask) for box, mask in zip(boxes, masks, strict=True)]
    copies = Boxes(torch.stack([box for box, _ in moved]))
    copy = heads.embed(images, features, [copies], [torch.stack([mask for _, mask in moved])])
    return views | {"copy": copy[0]}


def move(box: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A box (4,) and its mask (H, W), to the right and down; away from a border that is near."""
    height, width = mask.shape
    shift = ((box[2:] - box[:2]) * SHIFT).round().clamp(min=1)
    x, y = (
        int(s if e + s <= limit else -s)
        for s, e, limit in zip(shift, box[2:], (width, height), strict=True)
    )
    return box + torch.tensor([x, y, x, y]), mask.roll((y, x), (0, 1))


def measure_annotations(cfg: CfgNode, model: nn.Module, data: str) -> Numbers:
    """What is measured of the annotations."""
    node, here = cfg.MODEL.HIERARCHICAL_EMBEDDING, Annotated(cfg, model, data)
    fg, space = here.tangents["fg"], {"geometry": node.GEOMETRY, "c": node.CURVATURE}
    full, bg = (row_distances(here.tangents["full"], here.tangents[v], space) for v in ("fg", "bg"))
    nearest = torch.cat(
        [distances(some, here.tangents["copy"], **space).argmin(1) for some in fg.split(256)]
    )
    found = (nearest == torch.arange(len(fg))).double().mean()
    clusters = clustering_of(cfg)(fg)
    return {
        "gt NMI": 100 * normalized_mutual_information(clusters, here.classes),
        "gt kNN": 100 * knn_accuracy(fg, here.classes, **space),
        "wholes inside": 100 * hierarchy_accuracy(fg, here.pairs),
        "fg inside": 100 * float((full < bg).double().mean()),
        "same instance": 100 * float(found),
    }


def row_distances(first: Tensor, second: Tensor, space: dict[str, Any]) -> Tensor:
    """Distances (N,) of rows (N, D)."""
    if space["geometry"] == "euclidean":
        return (first.double() - second.double()).norm(dim=1)
    return tangent_dist(first, second, space["c"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--data", required=True, metavar="NAME")
    parser.add_argument("--write", required=True, type=Path, metavar="JSON")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE")
    args = parser.parse_args()
    setup_logger(name="unseg")
    cfg = load_config(args.config_file, args.words)
    model = build_model(cfg).eval()
    SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    numbers = measure_detections(cfg, model, args.data)
    numbers |= measure_annotations(cfg, model, args.data)
    clean = {key: None if np.isnan(value) else value for key, value in numbers.items()}
    write_whole(args.write, json.dumps(clean, indent=1))


if __name__ == "__main__":
    main()
