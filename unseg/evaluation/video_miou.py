"""Frame mIoU and foreground F-score, the protocol of spectral segmentation on videos.

Nothing of it is special to videos: any registered data set of instances will do. Numbers of this
protocol are comparable only where all of this is the same, so the results and the table say it:

- the resolution: "image" compares masks at the size of the image file, "patch" labels of the
  model's patch grid;
- how the ground truth is reduced to that grid: "corner" takes a patch's top left pixel, as resizing
  with OpenCV's or torch's "nearest" does (the published code), "center" the one in its middle,
  "majority" its most frequent value (see :func:`unseg.structures.sample_on_grid`);
- whether the model was told how many objects there are ("oracle K", as in the published numbers).

Legend: H W an image's size, h w its patch grid's, K predicted instances.
"""

import logging
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from pycocotools import mask as mask_util
from tabulate import tabulate

from unseg.data.instance_map import instance_index_map
from unseg.evaluation.build import EVALUATORS
from unseg.evaluation.matching import confusion_of_labels, f_score_of_confusion, miou_of_confusion
from unseg.layers.packed_masks import PackedMasks
from unseg.structures import GRID_MODES, GridLabels, WindowMasks, sample_on_grid

logger = logging.getLogger(__name__)

FLAVOURS = ("image", *(f"patch-{mode}" for mode in GRID_MODES))


@dataclass(frozen=True)
class FrameScore:
    """One frame at one resolution.

    Attributes:
        miou: in [0, 1], NaN without true instances.
        f_score: of the foreground, likewise.
        predicted: instances that were predicted there.
        annotated: true instances there.
    """

    miou: float
    f_score: float
    predicted: int
    annotated: int


def score_frame(pred: np.ndarray, gt: np.ndarray) -> FrameScore:
    """Compare two label maps (h, w) of small integers, 0 the background."""
    confusion = confusion_of_labels(pred, gt)
    predicted, annotated = (count - 1 for count in confusion.shape)
    return FrameScore(
        miou_of_confusion(confusion), f_score_of_confusion(confusion), predicted, annotated
    )


def label_map(instances: Instances) -> np.ndarray:
    """The masks of one image as a map without overlap: the higher score wins, then the first.

    Args:
        instances: at the size of the image file, with ``scores`` (K,) and ``pred_masks``: (K, H, W)
            bool or uint8, BitMasks, PackedMasks, WindowMasks or COCO run-length encodings.

    Returns:
        (H, W) int32: 0 is the background, k + 1 the k-th mask.

    Raises:
        ValueError: scores are missing or NaN, or masks of another form, number or size.
    """
    if not instances.has("scores") or torch.isnan(instances.scores).any():
        raise ValueError("scores are missing or NaN")
    masks = instances.pred_masks
    if not isinstance(masks, WindowMasks):
        masks = _dense(masks, instances.image_size)
    elif masks.image_size != tuple(instances.image_size):
        raise ValueError(f"pred_masks are {masks.image_size}, not {instances.image_size} (H, W)")
    labels = torch.zeros(instances.image_size, dtype=torch.int32, device=masks.device)
    # Painted from the last to the first; windows are pasted as they are painted.
    order = torch.argsort(instances.scores, descending=True, stable=True).flip(0)
    ordered = masks[order] if isinstance(masks, WindowMasks) else (masks[k] for k in order)
    for k, mask in zip(order.tolist(), ordered, strict=True):
        labels[mask] = k + 1
    return labels.cpu().numpy()


def _dense(masks: Any, size: tuple[int, int]) -> torch.Tensor:
    """(K, H, W) bool."""
    masks = getattr(masks, "tensor", masks)  # BitMasks
    masks = masks.to_dense() if isinstance(masks, PackedMasks) else masks
    if isinstance(masks, Sequence):
        decoded = [mask_util.decode(rle) for rle in masks]
        masks = np.stack(decoded) if decoded else np.zeros((0, *size), np.uint8)
    masks = torch.as_tensor(masks)
    if masks.dtype not in (torch.bool, torch.uint8) or masks.shape[1:] != tuple(size):
        raise ValueError(
            f"pred_masks must be bool of shape (K, {size[0]}, {size[1]}), got {masks.dtype} of "
            f"shape {tuple(masks.shape)}"
        )
    return masks.bool()


def _mean(values: Iterable[float]) -> float:
    """Exact in its sum, so that it does not depend on an order; NaN of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else float("nan")


@EVALUATORS.register()
class VideoMIoUEvaluator(DatasetEvaluator):
    """Mean over frames of the mIoU under the best matching, and of the foreground's F-score.

    A frame's mIoU is the sum of the matched IoUs over the number of true instances; predictions too
    many cost nothing. True instances may not overlap here: the later annotation wins a pixel.
    Crowds are left out, so their pixels are background. Frames without true instances (at that
    resolution: small ones may vanish on a grid) are skipped and counted.
    """

    @configurable
    def __init__(
        self, dataset_name: str, *, distributed: bool = True, oracle_k: bool = False
    ) -> None:
        """
        Args:
            dataset_name: a name in Detectron2's DatasetCatalog.
            distributed: collect the scores of all ranks on the main process, which alone returns
                numbers; otherwise each process evaluates its own.
            oracle_k: whether the model is told the number of objects; reported with the results.

        Raises:
            KeyError: no data set of that name is registered.
            ValueError: it has no objects (the official valid and test files of YouTube-VIS and OVIS
                have none), objects without masks, or image ids that are not unique.
        """
        if dataset_name not in DatasetCatalog.list():
            raise KeyError(f"dataset {dataset_name!r} is not registered")
        self._name = dataset_name
        self._distributed = distributed
        self._oracle_k = oracle_k
        self._records = _records_by_id(dataset_name)
        self.reset()

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> dict[str, Any]:
        """Arguments; the oracle is that of ``MODEL.DEEP_SPECTRAL.CLUSTERS.MODE``."""
        return {"dataset_name": dataset_name, "oracle_k": uses_oracle_k(cfg)}

    def reset(self) -> None:
        """Forget all scores."""
        # By image id, so that a frame seen twice counts once; then by flavour.
        self._scores: dict[Hashable, dict[str, FrameScore]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Score some frames.

        Args:
            inputs: dataset dicts, of which ``image_id`` is read.
            outputs: each with ``instances`` that have masks (for the resolution "image"; see
                :func:`label_map`), ``grid_labels`` (GridLabels, for "patch"), or both.

        Raises:
            ValueError: an output with neither, predictions of another size than the image, or an
                image that the data set lacks; the message names the image.
        """
        for record, output in zip(inputs, outputs, strict=True):
            image_id = record["image_id"]
            if image_id not in self._records:
                raise ValueError(f"image {image_id!r} is not in {self._name}")
            try:
                self._scores[image_id] = _score_output(self._records[image_id], output)
            except ValueError as error:
                raise ValueError(f"image {image_id!r}: {error}") from error

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{"video_miou": numbers}``; {} on other ranks than the main one.

        For each flavour (image, patch-corner, patch-center, patch-majority) that all frames have:
        ``mIoU-<flavour>`` and ``F-<flavour>``, means over frames, ``mIoU-<flavour>-by-video``, the
        mean over videos of the mean over their frames (where the data set has videos), all times
        100; ``K-<flavour>`` and ``K-true-<flavour>``, predicted and true instances per frame;
        ``skipped-<flavour>``, frames without true instances. Besides, ``frames``, how many were
        processed, and ``oracle-K``, 1 if the model knew the number of objects, else 0.
        """
        scores = self._scores
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(scores, dst=0)
            if not comm.is_main_process():
                return {}
            scores = {k: v for part in gathered for k, v in part.items()}
        # In the order of the data set, whatever the ranks did.
        scores = {k: scores[k] for k in self._records if k in scores}
        if len(scores) < len(self._records):
            logger.warning(
                "%d of %d images of %s were not processed: they are not in the means",
                len(self._records) - len(scores),
                len(self._records),
                self._name,
            )
        numbers: dict[str, float] = {}
        rows = []
        for flavour in self._flavours(scores):
            summary = self._summarize({k: v[flavour] for k, v in scores.items()})
            numbers |= {key.format(flavour): value for key, value in summary.items()}
            rows.append([flavour, *summary.values()])
        numbers |= {"frames": float(len(scores)), "oracle-K": float(self._oracle_k)}
        self._log(rows, len(scores))
        return {"video_miou": numbers}

    def _flavours(self, scores: dict[Hashable, dict[str, FrameScore]]) -> list[str]:
        """Those that all frames have; a mean over some of them would be of another data set."""
        counts = {f: sum(f in frame for frame in scores.values()) for f in FLAVOURS}
        partial = {f: n for f, n in counts.items() if 0 < n < len(scores)}
        if partial:
            logger.warning("not all %d frames have these outputs: %s", len(scores), partial)
        return [f for f, n in counts.items() if n and n == len(scores)]

    def _summarize(self, scores: dict[Hashable, FrameScore]) -> dict[str, float]:
        """Numbers of one flavour; the keys have a place for its name."""
        kept = {k: score for k, score in scores.items() if score.annotated}
        videos: dict[Hashable, list[float]] = {}
        for k, score in kept.items():
            videos.setdefault(self._records[k].get("video_id"), []).append(score.miou)
        numbers = {"mIoU-{}": 100 * _mean(score.miou for score in kept.values())}
        if set(videos) - {None}:
            numbers["mIoU-{}-by-video"] = 100 * _mean(map(_mean, videos.values()))
        return numbers | {
            "F-{}": 100 * _mean(score.f_score for score in kept.values()),
            "K-{}": _mean(score.predicted for score in kept.values()),
            "K-true-{}": _mean(score.annotated for score in kept.values()),
            "skipped-{}": float(len(scores) - len(kept)),
        }

    def _log(self, rows: list[list[Any]], frames: int) -> None:
        """One table, with what it was measured on."""
        header = ["resolution", "mIoU", "F", "K", "true K", "frames skipped"]
        if rows and len(rows[0]) > len(header):
            header.insert(2, "by video")
        metadata = MetadataCatalog.get(self._name)
        origin = metadata.get("annotation_file") or metadata.get("json_file") or self._name
        logger.info(
            "Frame mIoU on %s (%s): %d frames; the number of clusters is %s\n%s",
            self._name,
            origin,
            frames,
            "the annotated one (oracle)" if self._oracle_k else "the model's own",
            tabulate(rows, header, tablefmt="pipe", floatfmt=".2f"),
        )


def uses_oracle_k(cfg: CfgNode) -> bool:
    """Whether the model that a config describes is told the number of objects."""
    node: Any = cfg.MODEL
    if node.META_ARCHITECTURE != "DeepSpectral":
        return False
    for key in ("DEEP_SPECTRAL", "CLUSTERS", "MODE"):
        node = node.get(key, {})
    return node == "oracle"


def _records_by_id(dataset_name: str) -> dict[Hashable, dict[str, Any]]:
    """Checked dataset dicts by image id, in their order."""
    dicts = DatasetCatalog.get(dataset_name)
    records = {record["image_id"]: record for record in dicts}
    if len(records) != len(dicts):
        raise ValueError(f"image ids of {dataset_name} are not unique")
    objects = [
        annotation
        for record in dicts
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0)
    ]
    if not objects:
        raise ValueError(f"{dataset_name} has no annotated objects to compare with")
    without = sum(not annotation.get("segmentation") for annotation in objects)
    if without:
        raise ValueError(f"{without} of {len(objects)} objects of {dataset_name} have no mask")
    return records


def _score_output(record: dict[str, Any], output: dict[str, Any]) -> dict[str, FrameScore]:
    """Scores of one frame by flavour."""
    instances, grid = output.get("instances"), output.get("grid_labels")
    has_masks = instances is not None and instances.has("pred_masks")
    if not has_masks and grid is None:
        raise ValueError(
            f"the output has neither 'instances' with masks nor 'grid_labels', but {sorted(output)}"
        )
    size = (record["height"], record["width"])
    truth = instance_index_map(record.get("annotations", ()), *size)
    scores = {}
    if has_masks:
        if tuple(instances.image_size) != size:
            raise ValueError(
                f"predictions are of size {tuple(instances.image_size)}, the image is {size}"
            )
        scores["image"] = score_frame(label_map(instances), truth)
    if grid is not None:
        scores |= _score_grid(grid, truth)
    return scores


def _score_grid(grid: GridLabels, truth: np.ndarray) -> dict[str, FrameScore]:
    labels = grid.labels.cpu().numpy()
    return {
        f"patch-{mode}": score_frame(labels, sample_on_grid(truth, labels.shape, grid.extent, mode))
        for mode in GRID_MODES
    }
