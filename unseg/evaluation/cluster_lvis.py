"""Long-tail discovery on LVIS: clusters of detections are named and scored as its categories.

Weng et al., CVPR 2021, section on LVIS. The paper's protocol for names could not be read; see
:mod:`unseg.evaluation.cluster_naming` for the ones here.

Legend: N detections of the data set, n of an image, K clusters, C classes, D dimensions.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from unseg.checkpoint.files import atomic_write
from unseg.data.embeddings import open_embeddings
from unseg.evaluation.build import EVALUATORS
from unseg.evaluation.cluster_detections import (
    Detections,
    ImageDetections,
    collect_detections,
    keep_detections,
)
from unseg.evaluation.cluster_metrics import (
    clustering_accuracy,
    coverage,
    normalized_mutual_information,
    purity,
)
from unseg.evaluation.cluster_naming import (
    ClusterNames,
    EmbeddedObjects,
    NamingSettings,
    embedded_voters,
    fold_of_image,
    name_by_assignment,
    name_by_majority,
    vote_by_neighbours,
)
from unseg.evaluation.clustering import Clusterer, ClusterSettings
from unseg.evaluation.coco_class_agnostic import output_folder
from unseg.evaluation.lvis_api import (
    FREQUENCIES,
    METRICS,
    category_ids_of_classes,
    evaluate_lvis,
    import_lvis,
    lvis_ground_truth_of,
    part_of_images,
)

logger = logging.getLogger(__name__)

RESULTS_FILE = "cluster_lvis_results.json"


@EVALUATORS.register()
class ClusterLVISEvaluator(DatasetEvaluator):
    """LVIS's average precision of clustered detections, after the clusters have been named.

    Detections need ``scores``, ``pred_boxes`` and, for masks, ``pred_masks``, and ``pred_tangents``
    (n, D) of an embedding head, all of which are clustered together; or ``pred_clusters`` (n,) of a
    model that knows its clusters. Each cluster gets the name of a category or none (see
    :mod:`unseg.evaluation.cluster_naming`), and detections of clusters without one are dropped.

    With the split "two_fold" each half of the images is scored by names that the labels of the
    other half give, and the numbers are the means of the two. A category that has objects in one
    half only cannot be found so; with "same" names are made of the labels that they are scored by.
    """

    @configurable
    def __init__(
        self,
        dataset_name: str,
        *,
        cluster: Clusterer,
        naming: NamingSettings,
        geometry: str = "poincare",
        c: float = 1.0,
        ground_truth: EmbeddedObjects | None = None,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a name in Detectron2's DatasetCatalog, of an LVIS file (v0.5 or v1) or a
                synthetic one of the style "lvis" or "parts".
            cluster: clusters (N,) from 0 of tangents (N, D), for models that give none.
            naming: how clusters get their names.
            geometry, c: of the embeddings, for "knn_val".
            ground_truth: embedded objects, for "knn_val". Those of scored images have no vote with
                the split "two_fold".
            tasks: of "bbox" and "segm"; None: boxes, and masks where there are predicted ones.
            distributed: collect the detections of all ranks on the main process, which alone
                returns numbers; otherwise each process evaluates its own.
            output_dir: folder for ``cluster_lvis_results.json`` (COCO's result format, LVIS's
                category ids, named clusters only). None: not written.

        Raises:
            KeyError: no data set of that name is registered.
            ValueError: the data set has no LVIS ground truth, an unknown task, or "knn_val" without
                embedded objects.
        """
        if tasks is not None and (not tasks or not set(tasks) <= {"bbox", "segm"}):
            raise ValueError(f"tasks must be of 'bbox' and 'segm', got {tasks!r}")
        if naming.method == "knn_val" and ground_truth is None:
            raise ValueError("naming by 'knn_val' needs embedded ground truth")
        self._name = dataset_name
        self._cluster = cluster
        self._naming = naming
        self._space = {"geometry": geometry, "c": c}
        self._embedded = ground_truth
        self._tasks = None if tasks is None else tuple(tasks)
        self._distributed = distributed
        self._output_dir = output_dir
        if not distributed or comm.is_main_process():
            # Here, so that a missing file is noticed before the inference and not after it.
            import_lvis()
            self._content, self._origin = lvis_ground_truth_of(dataset_name)
            self._ids = category_ids_of_classes(dataset_name, self._content)
            self._classes = {number: c for c, number in self._ids.items()}
            if ground_truth is not None:
                unknown = set(np.unique(ground_truth.classes).tolist()) - {-1} - set(self._ids)
                if unknown:
                    raise ValueError(
                        f"embedded ground truth has classes {sorted(unknown)[:5]}, of "
                        f"which {self._origin} has no category"
                    )
        self.reset()

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> dict[str, Any]:
        """Arguments from ``MODEL.HIERARCHICAL_EMBEDDING`` and ``OUTPUT_DIR``."""
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        names, space = node.NAMING, {"geometry": node.GEOMETRY, "c": node.CURVATURE}
        embedded = None
        if names.METHOD == "knn_val":
            if not names.GROUND_TRUTH:
                raise ValueError(
                    "MODEL.HIERARCHICAL_EMBEDDING.NAMING.METHOD 'knn_val' needs GROUND_TRUTH, a "
                    "folder of unseg.tools.embed_dataset --ground-truth"
                )
            embedded = open_embeddings(names.GROUND_TRUTH)
            there = {"geometry": embedded.geometry, "c": embedded.c}
            curved = node.GEOMETRY != "euclidean"
            if there["geometry"] != node.GEOMETRY or (curved and there["c"] != node.CURVATURE):
                raise ValueError(f"{names.GROUND_TRUTH} is of {there}, the model of {space}")
        return {
            "dataset_name": dataset_name,
            "cluster": ClusterSettings.from_cfg(cfg),
            "naming": NamingSettings.from_cfg(cfg),
            "ground_truth": embedded,
            "output_dir": output_folder(cfg, dataset_name),
            **space,
        }

    def reset(self) -> None:
        """Forget all detections."""
        self._images: dict[Any, ImageDetections] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the detections of some images; masks are kept run-length encoded.

        Args:
            inputs: dataset dicts, of which ``image_id`` is read.
            outputs: each with ``instances``.

        Raises:
            ValueError: there are none, they have neither tangents nor clusters, or values that are
                NaN, infinite or of another shape; the message names the image.
        """
        for record, output in zip(inputs, outputs, strict=True):
            image_id = record["image_id"]
            if "instances" not in output:
                raise ValueError(f"image {image_id!r}: no 'instances', but {sorted(output)}")
            self._images[image_id] = keep_detections(output["instances"], image_id)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Numbers, times 100; {} on other ranks than the main one.

        "cluster_segm" and "cluster_bbox": LVIS's metrics (:data:`METRICS`); NaN where there is
        nothing to measure by. "clusters":

        =============================  ==========================================================
        clusters                       of one detection or more (a number, not times 100)
        named                          clusters with a name (a number)
        dropped                        share of detections in clusters without one
        covered, covered_{r,c,f}       share of the categories there are that have a cluster
        matched                        share of detections that match an object
        purity, NMI, ACC               of the matched ones' clusters, all images together
        =============================  ==========================================================

        Raises:
            ValueError: images that the ground truth does not have; detections of one image with,
                of another without clusters or tangents; or `tasks` asks for masks that they lack.
        """
        images = self._images
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(images, dst=0)
            if not comm.is_main_process():
                return {}
            # A sampler that pads the last batch sends an image to two ranks: keep one.
            images = {k: v for part in gathered for k, v in part.items()}
        self._check_images(images)
        tasks = self._choose_tasks(images)
        found = collect_detections(
            images,
            self._content,
            self._classes,
            self._cluster,
            min_iou=self._naming.match_iou,
            by_masks="segm" in tasks,
        )
        numbers = self._score(found, tasks)
        self._log(numbers, len(found.results))
        return numbers

    def _check_images(self, images: Mapping[Any, ImageDetections]) -> None:
        known = {image["id"] for image in self._content["images"]}
        unknown = [image_id for image_id in images if image_id not in known]
        if unknown:
            raise ValueError(f"image {unknown[0]!r} is not in {self._origin}")
        if len(images) < len(known):
            logger.warning(
                "%d of %d images of %s were not processed: all their objects count as missed",
                len(known) - len(images),
                len(known),
                self._name,
            )

    def _choose_tasks(self, images: Mapping[Any, ImageDetections]) -> tuple[str, ...]:
        """`tasks`, or what the predictions have."""
        have_masks = any(image.has_masks for image in images.values())
        if self._tasks is None:
            return ("bbox", "segm") if have_masks else ("bbox",)
        if images and "segm" in self._tasks and not have_masks:
            raise ValueError(f"masks of {self._name!r} are to be evaluated, but none are predicted")
        return self._tasks

    def _name_clusters(self, found: Detections, labelling: np.ndarray, hidden: set) -> ClusterNames:
        """Names by the objects of some images.

        Args:
            found: the detections.
            labelling: bool (N,), whether the objects of a detection's image may be looked at.
            hidden: ids of images whose objects must not be.
        """
        rules = {"min_purity": self._naming.min_purity, "min_size": self._naming.min_size}
        k = found.num_clusters
        if self._naming.method == "knn_val" and found.results:
            if found.tangents is None:
                raise ValueError("naming by 'knn_val' needs pred_tangents")
            points, classes = embedded_voters(self._embedded, hidden, self._naming)
            if points.shape[1] != found.tangents.shape[1]:
                raise ValueError(
                    f"embedded ground truth has {points.shape[1]} dimensions, pred_tangents have "
                    f"{found.tangents.shape[1]}"
                )
            votes = vote_by_neighbours(
                found.tangents, points, classes, k=self._naming.knn, **self._space
            )
            voting = votes >= 0
            return name_by_majority(found.clusters[voting], votes[voting], k, **rules)
        voting = labelling & (found.classes >= 0)
        clusters, votes = found.clusters[voting], found.classes[voting]
        if self._naming.method == "hungarian":
            return name_by_assignment(clusters, votes, k)
        return name_by_majority(clusters, votes, k, **rules)

    def _score(self, found: Detections, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """Name and score fold by fold."""
        fold_of = fold_of_image if self._naming.split == "two_fold" else lambda _: 0
        image_folds = {image["id"]: fold_of(image["id"]) for image in self._content["images"]}
        folds = np.array([image_folds[r["image_id"]] for r in found.results], dtype=np.int64)
        by_part, kept = [], []
        for fold in range(2 if self._naming.split == "two_fold" else 1):
            scored = {image_id for image_id, of in image_folds.items() if of == fold}
            inside = folds == fold
            if self._naming.split == "two_fold":
                names = self._name_clusters(found, ~inside, hidden=scored)
            else:
                names = self._name_clusters(found, inside, hidden=set())
            classes = names.of(found.clusters)
            results = [
                found.results[n] | {"category_id": self._ids[int(classes[n])]}
                for n in np.flatnonzero(inside & (classes >= 0))
            ]
            kept += results
            content = part_of_images(self._content, scored)
            by_part.append(self._score_part(content, results, names, tasks))
        self._write(kept)
        numbers = {key: _mean([part[key] for part in by_part]) for key in by_part[0]}
        total = len(found.results)
        numbers["clusters"] = {
            "clusters": float(len(np.unique(found.clusters))),
            **numbers["clusters"],
            "dropped": 100 * (total - len(kept)) / total if total else float("nan"),
            **self._agreement(found),
        }
        return numbers

    def _score_part(
        self,
        content: dict[str, Any],
        results: list[dict[str, Any]],
        names: ClusterNames,
        tasks: Sequence[str],
    ) -> dict[str, dict[str, float]]:
        numbers = {f"cluster_{task}": evaluate_lvis(content, results, task) for task in tasks}
        frequency = {category["id"]: category["frequency"] for category in content["categories"]}
        # A number without a category, if there is one, is in no group.
        groups = [frequency.get(self._ids.get(c), "") for c in range(max(self._ids) + 1)]
        present = [self._classes[a["category_id"]] for a in content["annotations"]]
        shares = coverage(names.classes, np.array(present, dtype=np.int64), groups)
        covered = {f"covered_{group}": 100 * shares.get(group, np.nan) for group in FREQUENCIES}
        numbers["clusters"] = {
            "named": float((names.classes >= 0).sum()),
            "covered": 100 * shares["all"],
            **covered,
        }
        return numbers

    def _agreement(self, found: Detections) -> dict[str, float]:
        """How the clusters of matched detections agree with their classes, names aside."""
        matched = found.classes >= 0
        clusters, classes = found.clusters[matched], found.classes[matched]
        return {
            "matched": 100 * float(matched.mean()) if len(matched) else float("nan"),
            "purity": 100 * purity(clusters, classes),
            "NMI": 100 * normalized_mutual_information(clusters, classes),
            "ACC": 100 * clustering_accuracy(clusters, classes),
        }

    def _write(self, results: list[dict[str, Any]]) -> None:
        if not self._output_dir:
            return
        path = os.path.join(self._output_dir, RESULTS_FILE)
        with atomic_write(path) as file:
            json.dump(sorted(results, key=lambda result: result["image_id"]), file)
        logger.info("%d results written to %s", len(results), path)

    def _log(self, numbers: dict[str, dict[str, float]], detections: int) -> None:
        rows = [[t, *values.values()] for t, values in numbers.items() if t != "clusters"]
        about = numbers["clusters"]
        logger.info(
            "Clusters as LVIS's classes on %s (%s), named by %s (%s): %d images, %d objects, %d "
            "detections\n%s\n%s",
            self._name,
            self._origin,
            self._naming.method,
            self._naming.split,
            len(self._content["images"]),
            len(self._content["annotations"]),
            detections,
            tabulate(rows, ["task", *METRICS], tablefmt="pipe", floatfmt=".2f"),
            tabulate([list(about.values())], list(about), tablefmt="pipe", floatfmt=".2f"),
        )


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over the parts that have one."""
    means = {}
    for key in parts[0]:
        values = [part[key] for part in parts if not np.isnan(part[key])]
        means[key] = float(np.mean(values)) if values else float("nan")
    return means
