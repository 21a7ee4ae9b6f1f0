"""What makes any config of this repository run in seconds."""

from pathlib import Path

import numpy as np
from detectron2.config import CfgNode

from unseg.config import load_config
from unseg.discovery import save_exemplar_pool
from unseg.structures import Exemplar, ExemplarPool

ROOT = Path(__file__).resolve().parents[2]

# Small images, small batches and narrow heads, on the data sets of the fixture `quick_datasets`.
# EXEMPLAR.POOL is a file of the folder that is written to, see `write_pool`.
QUICK = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "DATASETS.TRAIN": ("quick_train",),
    "DATASETS.TEST": ("quick_val",),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.FREESOLO.INSTANCE_CHANNELS": 16,
    "MODEL.FREESOLO.NUM_INSTANCE_CONVS": 1,
    "MODEL.FREESOLO.MASK_CHANNELS": 16,
    "MODEL.FREESOLO.NUM_KERNELS": 16,
    "MODEL.FREESOLO.GN_GROUPS": 4,
    "MODEL.FREESOLO.MAX_PER_IMG": 10,
    # Cells of an untrained model have scores of 0.01.
    "MODEL.FREESOLO.SCORE_THR": 0.001,
    "MODEL.FREESOLO.UPDATE_THR": 0.0,
}
# Instead of ResNets of any depth: the configs that need it are built whole by a test of their own.
SHALLOW = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}


POOL_FILE = "exemplars.npz"


def write_pool(folder: Path) -> None:
    """Two exemplars, of 40 x 64 and 50 x 33 pixels, for :func:`quick_overrides` of a folder."""
    rng = np.random.default_rng(0)
    exemplars = []
    for n, (height, width) in enumerate(((40, 64), (50, 33))):
        mask = np.zeros((height, width), dtype=bool)
        mask[8:30, 5:28] = True
        image = np.where(mask[..., None], rng.integers(0, 256, 3), 128).astype(np.uint8)
        box = (0, 0, width, height)
        embedding = np.ones(4, dtype=np.float32) / 2
        exemplars.append(Exemplar(image, mask, f"class{n}", f"{n}.jpg", box, "coarse", embedding))
    save_exemplar_pool(folder / POOL_FILE, ExemplarPool(tuple(exemplars)))


def words(overrides: dict) -> list:
    """KEY VALUE ... as for load_config."""
    return [x for item in overrides.items() for x in item]


def quick_overrides(path: Path, output: Path) -> dict:
    """Settings with which the config at `path` runs in seconds and writes to `output`."""
    overrides = QUICK | {"OUTPUT_DIR": str(output)}
    cfg = load_config(str(path))
    if "SyncBN" in (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM):  # needs a GPU
        overrides |= {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN"}
    if cfg.MODEL.META_ARCHITECTURE in ("FreeSOLO", "ExemplarFreeSOLO"):
        overrides |= SHALLOW
    if cfg.MODEL.EXEMPLAR.POOL:
        overrides["MODEL.EXEMPLAR.POOL"] = str(output / POOL_FILE)
    return overrides


def quick_config(path: Path, output: Path) -> CfgNode:
    """The config at `path` with :func:`quick_overrides`."""
    return load_config(str(path), words(quick_overrides(path, output)))
