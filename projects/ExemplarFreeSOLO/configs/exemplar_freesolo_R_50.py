"""exemplar_freesolo_R_50.yaml as a LazyConfig: FreeSOLO's, with a head and a pool.

    cfg = LazyConfig.load("projects/ExemplarFreeSOLO/configs/exemplar_freesolo_R_50.py")
    model = instantiate(cfg.model)

With Detectron2's own tools/lazyconfig_train_net.py:

    python lazyconfig_train_net.py --num-gpus 8 \\
        --config-file projects/ExemplarFreeSOLO/configs/exemplar_freesolo_R_50.py \\
        model.pool.path=exemplars.npz train.init_checkpoint=densecl_r50_d2.pth

Only training needs the pool: model.pool=null does without.
"""

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from unseg.discovery import load_exemplar_pool
from unseg.modeling import ExemplarFreeSOLO, FPNWithBottomUp
from unseg.modeling.exemplars import ExemplarContrast

_freesolo = LazyConfig.load_rel("../../FreeSOLO/configs/freesolo_R_50.py")

model = _freesolo.model
model._target_ = ExemplarFreeSOLO
model.backbone._target_ = FPNWithBottomUp
model.exemplars = L(ExemplarContrast)(
    in_feature="res5", weight=1.3, alpha=0.7, beta=0.3, temperature=0.1, reduction="mean"
)
model.pool = L(load_exemplar_pool)(path="exemplars.npz", per_category=0)
model.update_period = 500
model.pool_batch_size = 8

dataloader = _freesolo.dataloader
for _source, _name in zip(
    dataloader.train.dataset.names,
    (
        "round1_train2017.json@coco_2017_train",
        "round1_unlabeled2017.json@unseg_coco_2017_unlabeled",
    ),
    strict=True,
):
    _source.name = _name

optimizer, lr_multiplier, train = _freesolo.optimizer, _freesolo.lr_multiplier, _freesolo.train
