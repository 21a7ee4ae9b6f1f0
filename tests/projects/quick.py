"""What makes any config of this repository run in seconds."""

import pickle
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

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
# DeepMask and SharpMask: patches of 64 pixels, narrow heads. The data have other categories.
QUICK_DEEPMASK = {
    "MODEL.DEEPMASK.INPUT_SIZE": 64,
    "MODEL.DEEPMASK.OUT_SIZE": 14,
    "MODEL.DEEPMASK.GT_SIZE": 64,
    "MODEL.DEEPMASK.EMBED_DIM": 32,
    "MODEL.DEEPMASK.REDUCE_DIM": 16,
    "MODEL.DEEPMASK.SCORE_HIDDEN": 32,
    "MODEL.DEEPMASK.DATA.PATCHES_PER_IMAGE": 2,
    "MODEL.DEEPMASK.DATA.CATEGORY_SUBSET": (),
    "MODEL.DEEPMASK.TEST.TOPK": 20,
}
QUICK_INSTANCE_FCN = {
    "MODEL.VGG.DEPTH": 11,
    "MODEL.INSTANCE_FCN.HIDDEN": 16,
    "MODEL.INSTANCE_FCN.WINDOWS_PER_IMAGE": 16,
    "MODEL.INSTANCE_FCN.TEST.PRE_NMS_TOPK": 20,
    "MODEL.INSTANCE_FCN.TEST.TOPK": 20,
}
# Its patches, of one window each: 80 pixels instead of 224.
QUICK_CROPS = {
    "MODEL.INSTANCE_FCN.M": 7,
    "MODEL.DEEPMASK.INPUT_SIZE": 56,
    "MODEL.DEEPMASK.CONTEXT": 24,
    "MODEL.DEEPMASK.OBJECT_SIZE": 43,
    "MODEL.DEEPMASK.GT_SIZE": 7,
}
# Long-tail discovery, on scenes that LVIS's evaluators know.
QUICK_LONG_TAIL = {
    "DATASETS.TEST": ("quick_lvis",),
    "MODEL.HIERARCHICAL_EMBEDDING.CONV_DIM": 16,
    "MODEL.HIERARCHICAL_EMBEDDING.FC_DIM": 16,
    "MODEL.HIERARCHICAL_EMBEDDING.EMBED_DIM": 4,
    "MODEL.HIERARCHICAL_EMBEDDING.CROP_SIZE": 32,
    "MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS": "",
    "MODEL.HIERARCHICAL_EMBEDDING.CLUSTERING.K": 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
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


def write_proposals(folder: Path) -> None:
    """Precomputed proposals of the quick data sets, for :func:`quick_overrides` of a folder."""
    for name in ("quick_train", "quick_val"):
        ids = [x["image_id"] for x in DatasetCatalog.get(name)]
        boxes = np.array([[10, 10, 60, 60], [30, 40, 120, 140]], dtype=np.float32)
        content = {
            "ids": ids,
            "boxes": [boxes] * len(ids),
            "objectness_logits": [np.array([1.0, 0.0], dtype=np.float32)] * len(ids),
            "bbox_mode": BoxMode.XYXY_ABS,
        }
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content))


def words(overrides: dict) -> list:
    """KEY VALUE ... as for load_config."""
    return [x for item in overrides.items() for x in item]


def quick_overrides(path: Path, output: Path) -> dict:
    """Settings with which the config at `path` runs in seconds and writes to `output`."""
    overrides = QUICK | {"OUTPUT_DIR": str(output)}
    cfg = load_config(str(path))
    if "SyncBN" in (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM):  # needs a GPU
        overrides |= {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN"}
    if cfg.MODEL.META_ARCHITECTURE in ("FreeSOLO", "ExemplarFreeSOLO", "DeepMask", "SharpMask"):
        overrides |= SHALLOW
    if cfg.MODEL.META_ARCHITECTURE in ("DeepMask", "SharpMask"):
        overrides |= QUICK_DEEPMASK
    if "InstanceFCN" in cfg.MODEL.META_ARCHITECTURE + cfg.MODEL.PROPOSAL_GENERATOR.NAME:
        overrides |= QUICK_INSTANCE_FCN
        if cfg.MODEL.INSTANCE_FCN.TEST.SHORT_SIDES:
            overrides["MODEL.INSTANCE_FCN.TEST.SHORT_SIDES"] = (64, 96)
        if cfg.MODEL.INSTANCE_FCN.TRAIN_ON == "crop":
            overrides |= QUICK_CROPS
    if "HierarchicalEmbedding" in cfg.MODEL.ROI_HEADS.NAME:
        overrides |= QUICK_LONG_TAIL | SHALLOW
        if cfg.TEST.EVALUATORS == ("COCOEvaluator",):
            overrides["DATASETS.TEST"] = ("quick_val",)
    if cfg.MODEL.LOAD_PROPOSALS:
        overrides["DATASETS.PROPOSAL_FILES_TRAIN"] = (str(output / "quick_train.pkl"),)
        overrides["DATASETS.PROPOSAL_FILES_TEST"] = (str(output / "quick_val.pkl"),)
    if cfg.MODEL.EXEMPLAR.POOL:
        overrides["MODEL.EXEMPLAR.POOL"] = str(output / POOL_FILE)
    return overrides


def quick_config(path: Path, output: Path) -> CfgNode:
    """The config at `path` with :func:`quick_overrides`."""
    return load_config(str(path), words(quick_overrides(path, output)))
