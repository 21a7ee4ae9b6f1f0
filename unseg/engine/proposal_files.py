"""The proposals of any model on a whole data set, as files that other programs read.

``box_proposals.pkl`` is Detectron2's file of precomputed proposals (MODEL.LOAD_PROPOSALS);
``mask_proposals-00000.json``, ... are COCO results of 500 images each; ``manifest.json`` says what
they are of. The pickle is written last: where it is, everything is.

Legend: N proposals of an image, H W its height and width in pixels.
"""

import argparse
import base64
import json
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode, Instances
from torch import Tensor, nn

from unseg.checkpoint import atomic_write
from unseg.engine.dataset_job import DatasetJob, EntriesOfModel, ImageSource, entries_in_order
from unseg.engine.find_masks import run_job
from unseg.evaluation.coco_records import to_rle
from unseg.evaluation.predicted_masks import encode_predicted_masks, tight_boxes
from unseg.structures import RLE

logger = logging.getLogger(__name__)

BOX_FILE, MANIFEST = "box_proposals.pkl", "manifest.json"
MASK_FILES = "mask_proposals-{:05d}.json"
_FORMAT = "unseg proposals 1"
# Probabilities nearer to 0 and 1 than this become those of a logit of -16.1 and 16.1.
_CLAMP = 1e-7


@dataclass(frozen=True)
class ProposalCounts:
    """What was written.

    Attributes:
        images: of the data set.
        proposals: of all images.
        images_without_proposals: among them those that could not be read.
        unreadable_images: left out as ``INPUT.ON_BAD_IMAGE`` skip says.
        mask_files: 0 if the model gives no masks.
    """

    images: int
    proposals: int
    images_without_proposals: int
    unreadable_images: int
    mask_files: int


@dataclass(frozen=True)
class RankedProposals:
    """Proposals of one image by falling score, equal ones in the model's order.

    Attributes:
        boxes: float32 (N, 4) XYXY in pixels.
        logits: float32 (N,).
        scores: float64 (N,), probabilities.
        masks: N compressed encodings, or None if the model gives no masks.
    """

    boxes: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    masks: list[RLE] | None


def proposals_of(output: dict[str, Any], size: tuple[int, int]) -> RankedProposals:
    """What is written of a model's output for one image.

    Args:
        output: with ``proposals`` or else ``instances``: Instances at the original image size with
            ``objectness_logits``, or ``scores`` which are probabilities (their logit is taken, of
            probabilities in 1e-7..1 - 1e-7); ``proposal_boxes`` or ``pred_boxes``, or
            ``pred_masks``, or both. Without boxes, those of the masks are taken. Classes are not
            looked at.
        size: (H, W) of the image.

    Raises:
        ValueError: neither of the two, another image size, scores missing, not finite or no
            probabilities, boxes that are not finite, neither boxes nor masks, malformed masks.
    """
    if not isinstance(output, dict) or not {"proposals", "instances"} & output.keys():
        found = sorted(output) if isinstance(output, dict) else type(output).__name__
        raise ValueError(f"the output has neither 'proposals' nor 'instances', but {found}")
    instances: Instances = output["proposals"] if "proposals" in output else output["instances"]
    if tuple(instances.image_size) != size:
        raise ValueError(f"proposals are of an image of {instances.image_size}, it is {size}")
    fields = instances.get_fields()
    logits, scores = _logits_and_scores(fields)
    order = torch.argsort(-logits, stable=True)
    if "objectness_logits" not in fields:  # clamped logits tie where probabilities do not
        order = torch.argsort(-scores, stable=True)
    masks = None
    if "pred_masks" in fields:
        masks = encode_masks_of(fields["pred_masks"], size)
        if len(masks) != len(order):
            raise ValueError(f"there are {len(masks)} masks and {len(order)} scores")
        masks = [masks[i] for i in order.tolist()]
    boxes = fields.get("proposal_boxes", fields.get("pred_boxes"))
    if boxes is not None:
        corners = boxes.tensor.detach().cpu().float()[order].numpy()
    elif masks is not None:
        corners = tight_boxes(masks).float().numpy()
    else:
        raise ValueError(f"proposals need boxes or masks; they have {sorted(fields)}")
    if not np.isfinite(corners).all():
        raise ValueError("boxes are NaN/inf")
    return RankedProposals(corners, logits[order].float().numpy(), scores[order].numpy(), masks)


def _logits_and_scores(fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both float64 (N,), whichever of them the fields have."""
    given = fields.get("objectness_logits", fields.get("scores"))
    if given is None:
        raise ValueError(f"proposals need objectness_logits or scores; they have {sorted(fields)}")
    given = given.detach().cpu().double()
    if given.ndim != 1 or not torch.isfinite(given).all():
        raise ValueError("scores must be a vector of finite numbers")
    if "objectness_logits" in fields:
        return given, given.sigmoid()
    if len(given) and not (given.min() >= 0 and given.max() <= 1):
        raise ValueError("scores must be probabilities to have a logit")
    return given.clamp(_CLAMP, 1 - _CLAMP).logit(), given


def encode_masks_of(masks: Any, size: tuple[int, int]) -> list[RLE]:
    """Compressed encodings of masks in any of the forms that models give.

    Raises:
        ValueError: they are of another size than (H, W), or malformed.
    """
    encoded = encode_predicted_masks(masks)
    if isinstance(masks, Sequence):
        return [to_rle(rle, *size, "a proposal") for rle in encoded]
    if encoded and tuple(encoded[0]["size"]) != size:
        found = tuple(encoded[0]["size"])
        raise ValueError(f"pred_masks are {found}, the image is {size} (H, W)")
    return encoded


def _to_entry(found: RankedProposals) -> dict[str, Any]:
    entry = {
        "boxes": base64.b64encode(found.boxes.astype("<f4").tobytes()).decode(),
        "logits": base64.b64encode(found.logits.astype("<f4").tobytes()).decode(),
        "scores": found.scores.tolist(),
        "masks": None,
    }
    if found.masks is not None:
        entry["masks"] = [_text(mask["counts"]) for mask in found.masks]
    return entry


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


class ProposalFilesJob(DatasetJob[ProposalCounts]):
    """Writes the proposals of a model on a data set to the files of a folder.

    In memory are at most the masks of 500 images, encoded, and the boxes of all.
    """

    block: int = 500  # images in a file of masks, as in those that are published

    def __init__(
        self,
        cfg: CfgNode,
        source: ImageSource,
        output: str | os.PathLike,
        *,
        weights: str | None = None,
        origin: dict[str, Any] | None = None,
    ):
        """
        Args:
            cfg, source, weights: see :class:`DatasetJob`.
            output: the folder.
            origin: JSON-able, kept in the manifest.

        Raises:
            ValueError: two images share an id.
        """
        super().__init__(cfg, source, output, weights=weights)
        if len({str(image.image_id) for image in source.images}) < len(source.images):
            raise ValueError("the data set's image ids are not unique")
        self.origin = origin or {}

    def is_written(self) -> bool:
        """Whether all files are there already, made by a job with the same settings."""
        try:
            manifest = json.loads((self.output / MANIFEST).read_text())
            names = [*manifest["masks"], manifest["boxes"]]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        ours = manifest.get("format") == _FORMAT and manifest.get("unseg") == self.info
        return ours and all((self.output / name).is_file() for name in names)

    def processor(self, model: nn.Module) -> EntriesOfModel:
        """Finds the proposals of a unit."""
        return EntriesOfModel(model, lambda *x: _to_entry(proposals_of(*x)))

    def collect(self) -> ProposalCounts:
        """Write the files from the finished units and remove the work folder.

        Raises:
            ValueError: the proposals of some images have masks, those of others do not.
        """
        self._remove_files()
        boxes: dict[str, list[Any]] = {"ids": [], "boxes": [], "objectness_logits": []}
        with_masks = {True: 0, False: 0}
        unreadable = 0
        names = []
        entries = entries_in_order(self.work_dir.results())
        for number in range(-(-len(self.source.images) // self.block)):
            names.append(MASK_FILES.format(number))
            with atomic_write(self.output / names[-1]) as file:
                separator = "[\n"
                for index, entry in islice(entries, self.block):
                    unreadable += entry is None
                    _add_boxes(boxes, self.source.images[index].image_id, entry)
                    if entry is not None and entry["scores"]:
                        with_masks[entry["masks"] is not None] += 1
                    for result in self._coco_results(index, entry):
                        file.write(separator + json.dumps(result, separators=(",", ":")))
                        separator = ",\n"
                file.write("[]\n" if separator == "[\n" else "\n]\n")
        if all(with_masks.values()):
            self._remove_files()
            raise ValueError(
                f"the proposals of {with_masks[True]} images have masks, those of "
                f"{with_masks[False]} do not"
            )
        if with_masks[False]:
            for name in names:
                (self.output / name).unlink()
            names = []
        counts = _count(boxes, unreadable, len(names))
        self._write_manifest(names, counts)
        with atomic_write(self.output / BOX_FILE, "wb") as file:
            pickle.dump(boxes | {"bbox_mode": int(BoxMode.XYXY_ABS)}, file, protocol=4)
        self.work_dir.remove()
        return counts

    def _remove_files(self) -> None:
        """Those of an earlier job; the pickle first: what is left must not be taken for whole."""
        old = [self.output / BOX_FILE, self.output / MANIFEST]
        for path in [*old, *sorted(self.output.glob(MASK_FILES.replace("{:05d}", "[0-9]*")))]:
            path.unlink(missing_ok=True)

    def _coco_results(self, index: int, entry: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        image = self.source.images[index]
        if entry is None or entry["masks"] is None:
            return
        for score, counts in zip(entry["scores"], entry["masks"], strict=True):
            yield {
                "image_id": image.image_id,
                "category_id": 1,
                "score": score,
                "segmentation": {"size": [image.height, image.width], "counts": counts},
            }

    def _write_manifest(self, names: list[str], counts: ProposalCounts) -> None:
        manifest = {
            "format": _FORMAT,
            **self.origin,
            "model": self.cfg.MODEL.META_ARCHITECTURE,
            "boxes": BOX_FILE,
            "masks": names,
            "images_per_file": self.block,
            "counts": asdict(counts),
            "unseg": self.info,
        }
        with atomic_write(self.output / MANIFEST) as file:
            json.dump(manifest, file, indent=1)
            file.write("\n")


def _add_boxes(boxes: dict[str, list[Any]], image_id: int, entry: dict[str, Any] | None) -> None:
    """Every image has its place, also those without proposals."""
    boxes["ids"].append(image_id)
    entry = entry or {"boxes": "", "logits": ""}
    boxes["boxes"].append(_floats(entry["boxes"]).reshape(-1, 4))
    boxes["objectness_logits"].append(_floats(entry["logits"]))


def _count(boxes: dict[str, list[Any]], unreadable: int, mask_files: int) -> ProposalCounts:
    numbers = [len(logits) for logits in boxes["objectness_logits"]]
    return ProposalCounts(len(numbers), sum(numbers), numbers.count(0), unreadable, mask_files)


def export_proposals(args: argparse.Namespace, log: str | None = None) -> None:
    """One process of the job.

    Args:
        args: of :func:`unseg.engine.find_masks_parser`; ``output`` is a folder.
        log: a file for the log beside the standard output, ending in ``.txt``.
    """
    origin = {"config": args.config_file, "dataset": args.dataset}
    counts = run_job(partial(ProposalFilesJob, origin=origin), args, log)
    if counts is None:
        return
    logger.info(
        "wrote %s: %d proposals of %d images, %d files of masks",
        args.output,
        counts.proposals,
        counts.images,
        counts.mask_files,
    )
    if counts.images_without_proposals:
        logger.warning(
            "%d of %d images have no proposal (%d could not be read)",
            counts.images_without_proposals,
            counts.images,
            counts.unreadable_images,
        )
