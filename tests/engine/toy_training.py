"""A model of a few weights on a data set of seven images, to test training itself.

Run as a script it trains in its own process: ``toy_training.py OUTPUT_DIR IMAGE_DIR MAX_ITER``.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from unseg.config import get_cfg
from unseg.engine import Trainer
from unseg.structures import encode_masks


@META_ARCH_REGISTRY.register()
class ToyModel(nn.Module):
    """A few weights, dropout (so that step seeds matter) and Detectron2's interface."""

    def __init__(self, cfg):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)
        )
        self.out = nn.Linear(4, 2)
        self.vis_period = cfg.VIS_PERIOD
        self.nan_on = None

    @property
    def device(self):
        return self.out.weight.device

    def forward(self, batched_inputs):
        images = torch.stack([x["image"].float() / 255 for x in batched_inputs])
        out = self.out(self.net(images).mean((2, 3)))
        if not self.training:
            return [{"instances": self.prediction(x)} for x in batched_inputs]
        counts = torch.tensor([len(x["instances"]) for x in batched_inputs])
        losses = {"loss_count": (out[:, 0] - counts).square().mean(), "loss_two": out[:, 1].mean()}
        if self.nan_on in [x["image_id"] for x in batched_inputs]:
            losses["loss_two"] = losses["loss_two"] * float("nan")
        return losses

    def prediction(self, x):
        size = x["image"].shape[1:]
        instances = Instances(tuple(size))
        instances.pred_masks = torch.ones((1, *size), dtype=torch.bool)
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
        instances.scores = torch.tensor([0.9])
        instances.pred_classes = torch.tensor([0])
        return instances


def toy_cfg(output, **changes):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ToyModel"
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = ("toy_train",)
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)
    cfg.INPUT.MIN_SIZE_TEST = 32
    cfg.INPUT.FORMAT = "RGB"
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 12
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.WARMUP_ITERS = 5
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(output)
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    os.makedirs(output, exist_ok=True)
    return cfg


def register_toy_dataset(folder):
    """Seven images of noise with one to three masks, as ``toy_train``."""
    rng = np.random.default_rng(0)
    dicts = []
    for i in range(7):
        path = Path(folder) / f"{i}.png"
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if not path.exists():
            Image.fromarray(pixels).save(path)
        annotations = []
        for k in range(1 + i % 3):
            mask = np.zeros((1, 32, 32), dtype=bool)
            mask[0, 4 * k : 4 * k + 8, 3:20] = True
            annotations.append(
                {
                    "bbox": [3, 4 * k, 17, 8],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "iscrowd": 0,
                    "segmentation": encode_masks(mask)[0],
                }
            )
        dicts.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": 32,
                "width": 32,
                "annotations": annotations,
            }
        )
    DatasetCatalog.register("toy_train", lambda: dicts)
    MetadataCatalog.get("toy_train").set(
        thing_classes=["object"], evaluator_type="coco_class_agnostic"
    )


class Recording(Trainer):
    """Writes down the losses of every step, exactly, in memory and in ``losses.jsonl``."""

    def run_step(self):
        super().run_step()
        losses = {k: v.item().hex() for k, v in self._watch.losses.items()}
        self.__dict__.setdefault("log", {})[self.iter] = losses
        with open(Path(self.cfg.OUTPUT_DIR) / "losses.jsonl", "a") as file:
            file.write(json.dumps([self.iter, losses]) + "\n")


def read_losses(folder):
    """Iteration -> losses; a later line of the same iteration must say the same."""
    losses = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        iteration, values = json.loads(line)
        assert losses.setdefault(iteration, values) == values, f"iteration {iteration} differs"
    return losses


def main(output, images, max_iter):
    register_toy_dataset(images)
    cfg = toy_cfg(output, SOLVER__MAX_ITER=int(max_iter), SOLVER__CHECKPOINT_PERIOD=20)
    torch.manual_seed(cfg.SEED)
    trainer = Recording(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
