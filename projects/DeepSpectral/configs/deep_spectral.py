"""deep_spectral.yaml as a LazyConfig: the same model and data, to be changed in Python.

    cfg = LazyConfig.load("projects/DeepSpectral/configs/deep_spectral.py")
    model = instantiate(cfg.model).eval()

There is nothing to train. With Detectron2's own tools/lazyconfig_train_net.py:

    python lazyconfig_train_net.py --config-file projects/DeepSpectral/configs/deep_spectral.py \\
        --eval-only train.init_checkpoint=dino_vits16_d2.pth
"""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts

from unseg.data import register_if_file
from unseg.data.mappers import InstanceMapper, ResizeShortestEdge
from unseg.evaluation import ClassAgnosticCOCOEvaluator
from unseg.modeling import DeepSpectral, DinoViT

# Dataclasses are targets by their names: Detectron2 0.5 does not take them for targets otherwise.
_SETTINGS = "unseg.discovery.spectral.settings"

model = L(DeepSpectral)(
    backbone=L(DinoViT)(
        vit=L("unseg.checkpoint.vit.create_dino_vit")(arch="vit_small", patch_size=16),
        out_features=["key"],
        block=-1,
        freeze=True,
    ),
    settings=L("unseg.discovery.SpectralSettings")(
        ncr=L(f"{_SETTINGS}.NCRSettings")(
            enabled=True, bins=30, divisor=3, mode_foreground="paper", mode_instances="paper"
        ),
        dcr=L(f"{_SETTINGS}.DCRSettings")(enabled=True, keep_ratio=60 / 128),
        foreground=L(f"{_SETTINGS}.ForegroundSettings")(
            border=5, border_ratio=0.9, min_area_ratio=0.1, area="pixels", median=3
        ),
        clusters=L(f"{_SETTINGS}.ClusterSettings")(
            mode="auto", num=3, max_num=8, min_silhouette=0.35, seed=0, num_init=10
        ),
        affinity="boc",
        background="quotient",
        num_eigenvectors=4,
        embedding_median=5,
        solver="auto",
        split_components=True,
        min_area=0.01,
        upsample="bilinear",
        embedding_dim=128,
    ),
    oracle_sampling="center",
    output_intermediates=False,
    in_feature="key",
    max_patches=8192,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)

dataloader = {
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=L(register_if_file)(name="unseg_coco_2017_val_cls_agnostic"), filter_empty=False
        ),
        mapper=L(InstanceMapper)(
            is_train=False,
            # 0: the image stays as it is.
            augmentations=[
                L(ResizeShortestEdge)(short_edge_length=0, max_size=1333, sample_style="choice")
            ],
            image_format="RGB",
        ),
        num_workers=4,
    ),
    "evaluator": L(ClassAgnosticCOCOEvaluator)(
        dataset_name="${dataloader.test.dataset.names.name}",
        output_dir="${train.output_dir}/inference",
    ),
}

train = {"output_dir": "./output", "init_checkpoint": "", "device": "cuda"}
