"""Cut exemplars out of images, unit by unit, and write them as a pool with its contact sheet.

Legend: N masks, D embedding length, H W image, h w crop.
"""

import base64
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import nn

from unseg.checkpoint import atomic_write
from unseg.data.build import skips_bad_images
from unseg.data.image import ImageReadError, read_image
from unseg.data.mappers import build_augmentations
from unseg.discovery import (
    ExemplarError,
    ExemplarSettings,
    coarse_foreground,
    cut_out,
    save_exemplar_pool,
)
from unseg.engine.dataset_job import collect_if_complete, job_settings
from unseg.engine.exemplar_plan import Candidates, ExemplarPlan
from unseg.engine.exemplar_sheet import PICTURE_SIDE, SourceView, draw_exemplar_sheet, shrink
from unseg.engine.exemplars import embedding_origin
from unseg.engine.sharded_map import WorkDir, sharded_map

# The unit is encoded by the process that has it; encode_exemplars() is for ranks that all have the
# same exemplars, and would wait for the others here.
from unseg.modeling.exemplars import encode_batch
from unseg.structures import Exemplar, ExemplarPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Split:
    """An image and GrabCut's foreground (H, W) bool, None if it found none."""

    category: str
    file_name: str
    image: np.ndarray
    coarse: np.ndarray | None


class _Loader:
    """Reads a unit's images and splits them, which takes longer than the model does."""

    def __init__(self, cfg: CfgNode, plan: ExemplarPlan):
        self.settings = ExemplarSettings.from_config(cfg)
        self.skip_bad = skips_bad_images(cfg)
        self.plan = plan

    def __call__(self, unit: int) -> tuple[list[_Split], int]:
        """The unit's images, and how many could not be read."""
        found: list[_Split] = []
        skipped = 0
        for candidates in self.plan.units[unit]:
            splits, bad = self._load(candidates)
            found += splits
            skipped += bad
        return found, skipped

    def _load(self, candidates: Candidates) -> tuple[list[_Split], int]:
        splits: list[_Split] = []
        skipped = 0
        for name in candidates.file_names:
            if len(splits) == candidates.count:
                break
            try:
                image = read_image(f"{self.plan.root}/{name}" if self.plan.root else name)
            except ImageReadError as error:
                if not self.skip_bad:
                    raise
                logger.warning("left out %s", error)
                skipped += 1
                continue
            coarse = coarse_foreground(image, self.settings)
            splits.append(_Split(candidates.category, name, image, coarse))
        return splits, skipped


class ExemplarMaker:
    """Cuts objects out with a model's masks and embeds them with its backbone."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            cfg: the model's, with MODEL.EXEMPLAR.
            model: its output has ``pred_masks`` and ``scores``, its backbone IN_FEATURE.

        Raises:
            ExemplarError: it gives no masks.
            ExemplarFeatureError: its backbone has no such output.
        """
        self.model = model.eval()
        # Discoverers do not say it; whatever reads images for them goes by the config.
        if getattr(model, "input_format", None) is None:
            model.input_format = cfg.INPUT.FORMAT
        self.augmentations = T.AugmentationList(build_augmentations(cfg, False))
        self.settings = ExemplarSettings.from_config(cfg)
        self.in_feature = cfg.MODEL.EXEMPLAR.IN_FEATURE
        # Before anything is written or hours have passed.
        gray = np.full((64, 64, 3), 128, dtype=np.uint8)
        self.segment(gray)
        self.encode([gray])

    @torch.no_grad()
    def segment(self, crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The model's masks in a crop (h, w, 3) uint8 RGB: (N, h, w) bool, scores (N,)."""
        flip = -1 if self.model.input_format == "BGR" else 1
        view = T.AugInput(np.ascontiguousarray(crop[:, :, ::flip]))
        self.augmentations(view)
        image = torch.from_numpy(np.ascontiguousarray(view.image.transpose(2, 0, 1)))
        height, width = crop.shape[:2]
        (output,) = self.model([{"image": image, "height": height, "width": width}])
        found = output.get("instances")
        if found is None or not (found.has("pred_masks") and found.has("scores")):
            raise ExemplarError(
                f"the model ({type(self.model).__name__}) gives no instances with masks "
                "(pred_masks, scores), which the exemplars are cut out with"
            )
        masks = np.asarray(found.pred_masks.to("cpu")).astype(bool, copy=False)
        return masks, found.scores.cpu().numpy()

    @torch.no_grad()
    def encode(
        self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Embeddings of one batch, by this process alone.

        Args:
            images: (H, W, 3) uint8 RGB each.
            masks: (H, W) bool each; None: the whole images.

        Returns:
            (len(images), D) float32.
        """
        if masks is None:
            masks = [np.ones(image.shape[:2], dtype=bool) for image in images]
        return encode_batch(self.model, images, masks, self.in_feature).float().cpu().numpy()

    def __call__(self, loaded: tuple[list[_Split], int]) -> tuple[dict[str, Any], int]:
        splits, skipped = loaded
        cuts = [cut_out(x.image, x.coarse, self.segment, self.settings) for x in splits]
        embeddings = self.encode([c.image for c in cuts], [c.mask for c in cuts]) if cuts else []
        entries = [
            {
                "category": split.category,
                "file_name": split.file_name,
                "box": [int(x) for x in cut.box],
                "mask_from": cut.mask_from,
                "image": _to_png(cut.image),
                "mask": _to_png(cut.mask.astype(np.uint8) * 255),
                "embedding": floats_to_text(embedding),
                "source": _to_png(shrink(split.image, PICTURE_SIDE)),
                "source_size": split.image.shape[:2],
            }
            for split, cut, embedding in zip(splits, cuts, embeddings, strict=True)
        ]
        return {"exemplars": entries, "skipped": skipped}, len(entries)


def _to_png(image: np.ndarray) -> str:
    """An RGB or gray uint8 image as text, without loss."""
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    _, data = cv2.imencode(".png", image)
    return base64.b64encode(data.tobytes()).decode()


def _from_png(text: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image.ndim == 3 else image


def floats_to_text(values: np.ndarray) -> str:
    """A float32 vector, to the last bit."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def floats_from_text(text: str) -> np.ndarray:
    """What :func:`floats_to_text` was given."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


def exemplar_settings(cfg: CfgNode) -> dict[str, Any]:
    """The parts of a config that a pool depends on, without what is about training with it."""
    settings = job_settings(cfg)
    exemplar = settings["MODEL"]["EXEMPLAR"]
    settings["MODEL"]["EXEMPLAR"] = {key: exemplar[key] for key in ("IN_FEATURE", "BUILD")}
    return settings


def sheet_path(output: str | os.PathLike) -> Path:
    """Where the contact sheet of a pool is."""
    return Path(output).with_suffix(".png")


class ExemplarJob:
    """Cuts out the exemplars of a plan and writes the pool and its contact sheet.

    Work in progress lies in ``<output>.parts``; see :class:`unseg.engine.PseudoMaskJob`.
    """

    def __init__(
        self, cfg: CfgNode, plan: ExemplarPlan, output: str | os.PathLike, info: dict[str, Any]
    ):
        """
        Args:
            cfg: model, INPUT and MODEL.EXEMPLAR settings.
            plan: what is wanted.
            output: the .npz file to write.
            info: what the pool depends on; becomes part of its info.
        """
        self.cfg = cfg
        self.plan = plan
        self.output = Path(output)
        self.info = info
        self.loader = _Loader(cfg, plan)
        job = info | {"plan": plan.fingerprint()}
        self.work_dir = WorkDir(f"{output}.parts", job, len(plan.units))

    def run(self, maker: ExemplarMaker, units: Sequence[int], name: str) -> None:
        """Work through some units, as the process of that name; the work folder is open."""
        sharded_map(
            self.loader,
            maker,
            self.work_dir,
            units,
            name=name,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            noun="exemplars",
        )

    def collect_if_complete(self) -> ExemplarPool | None:
        """:meth:`collect` by whichever process is last; None for the others."""
        return collect_if_complete(self.work_dir, self.output, self.collect)

    def collect(self) -> ExemplarPool:
        """Write the sheet and the pool from the finished units, and remove the work folder.

        Raises:
            ExemplarError: no image could be read. The work folder is removed then, too.
        """
        exemplars, views = [], []
        skipped = self.plan.unreadable
        for result in self.work_dir.results():
            skipped += result["skipped"]
            for entry in result["exemplars"]:
                exemplars.append(_to_exemplar(entry))
                views.append(SourceView(_from_png(entry["source"]), tuple(entry["source_size"])))
        if not exemplars:
            self.work_dir.remove()
            raise ExemplarError(f"none of the {skipped} images can be read; nothing is written")
        origins = Counter(exemplar.mask_from for exemplar in exemplars)
        statistics = {key: origins[key] for key in ("refined", "coarse", "whole")}
        embedding = embedding_origin(self.cfg) | {"channels": len(exemplars[0].embedding)}
        about = {"embedding": embedding, "statistics": statistics | {"skipped": skipped}}
        pool = ExemplarPool(tuple(exemplars), self.info | about)
        sheet = draw_exemplar_sheet(pool, views)
        with atomic_write(sheet_path(self.output), "wb") as file:
            _, data = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
            file.write(data.tobytes())
        # The pool is last: where it is, everything is.
        save_exemplar_pool(self.output, pool)
        self.work_dir.remove()
        return pool


def _to_exemplar(entry: dict[str, Any]) -> Exemplar:
    return Exemplar(
        image=_from_png(entry["image"]),
        mask=_from_png(entry["mask"]) > 127,
        category=entry["category"],
        file_name=entry["file_name"],
        box=tuple(entry["box"]),
        mask_from=entry["mask_from"],
        embedding=floats_from_text(entry["embedding"]),
    )
