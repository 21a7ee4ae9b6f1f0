"""Every YAML of configs/ and projects/ loads, builds and runs: two steps of training, one test."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from quick import ROOT, quick_config, quick_overrides, words, write_pool, write_proposals

from unseg.config import load_config
from unseg.data import register_datasets_in_config
from unseg.engine import ProposalFilesJob, PseudoMaskJob, Trainer, images_of_dataset, main
from unseg.modeling import FreeSOLO, MaskDiscovery, find_exemplar_head

CONFIGS = sorted((ROOT / "projects").glob("*/configs/*.yaml"))
BASES = sorted((ROOT / "configs").glob("*.yaml"))
# Configs that differ from another one in what is evaluated, and the tasks that the kind of their
# data set leaves.
EVALUATION_TASKS = {
    "freesolo_R_101_uvo.yaml": {"bbox", "segm"},
    "freesolo_R_101_voc.yaml": {"bbox"},
    "exemplar_freesolo_R_101_uvo.yaml": {"bbox", "segm"},
    "exemplar_freesolo_R_101_voc.yaml": {"bbox"},
    "deepmask20_star_R_50.yaml": {"segm_proposals", "box_proposals_coco"},
}
RESULTS = {
    "ProposalRecallEvaluator": {"segm_proposals", "box_proposals_coco"},
    "PatchMaskEvaluator": {"patches"},
    "ClusterLVISEvaluator": {"cluster_bbox", "cluster_segm", "clusters"},
    "COCOEvaluator": {"bbox"},  # Detectron2's: masks too if the first image has any
}
# Depth: entries and millions of values in the state dicts of the released code's models.
ARCHITECTURES = ("FreeSOLO", "ExemplarFreeSOLO")
RELEASED = {50: (336, 46.88), 101: (591, 65.92)}

pytestmark = pytest.mark.usefixtures("quick_datasets")


def test_there_are_configs():
    assert len(CONFIGS) >= 68
    assert len(BASES) >= 7
    assert {path.name for path in CONFIGS} > EVALUATION_TASKS.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parents[1].name}/{p.name}")
def test_config_runs(path, tmp_path):
    cfg = quick_config(path, tmp_path)
    register_datasets_in_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE in ("MaskDiscovery", "DeepSpectral"):
        run_discovery(cfg, tmp_path)
    elif path.name in EVALUATION_TASKS:
        run_evaluation(path, tmp_path, EVALUATION_TASKS[path.name])  # without a pool
    else:
        write_pool(tmp_path)
        write_proposals(tmp_path)
        run_training(cfg, tmp_path)


def run_training(cfg, folder):
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.iter == 2
    assert (folder / "model_final.pth").is_file()
    expected = {"bbox", "segm"} if cfg.MODEL.MASK_ON else {"bbox"}
    if cfg.TEST.EVALUATORS:
        expected = set().union(*(RESULTS[name] for name in cfg.TEST.EVALUATORS))
    assert set(trainer._last_eval_results) >= expected
    if cfg.MODEL.EXEMPLAR.POOL:
        assert len(find_exemplar_head(trainer.model).pool_embeddings) == 2
        assert trainer._watch.losses["loss_exemplar"].isfinite()


def run_discovery(cfg, folder):
    model = build_model(cfg)
    assert isinstance(model, MaskDiscovery)
    if cfg.INPUT.MAPPER == "OracleMapper":  # for evaluation: it looks at the ground truth
        results = Trainer.test(cfg, model.eval())["video_miou"]
        assert results["oracle-K"] == 1
        assert 0 <= results["mIoU-patch-corner"] <= 100
        return
    job = PseudoMaskJob(cfg, images_of_dataset("quick_val"), folder / "x.json")
    job.start(resume=False)
    job.run(model)
    assert job.collect_if_complete().images == 2
    results = Trainer.test(cfg, model.eval())
    assert set(results) >= {"bbox", "segm"}
    if "VideoMIoUEvaluator" in cfg.TEST.EVALUATORS:
        assert results["video_miou"]["oracle-K"] == 0
        assert 0 <= results["video_miou"]["mIoU-image"] <= 100


def run_evaluation(path, folder, tasks):
    overrides = quick_overrides(path, folder)
    if tasks == {"bbox"}:
        overrides["DATASETS.TEST"] = ("quick_boxes",)
    flags = ["--eval-only", "--config-file", str(path)]
    results = main([*flags, *map(str, words(overrides))])
    assert set(results) == tasks


@pytest.mark.parametrize("path", BASES + CONFIGS, ids=lambda p: p.name)
def test_config_is_read_without_other_repositories(path):
    """Bases lie in this repository; class-agnostic models have one class."""
    text = path.read_text()
    for line in text.splitlines():
        if line.startswith("_BASE_:"):
            base = (path.parent / line.split(":", 1)[1].strip().strip('"')).resolve()
            assert base.is_relative_to(ROOT)
    cfg = load_config(str(path))
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.INPUT.CLASS_AGNOSTIC:
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1


@pytest.mark.parametrize(
    "name", ["DeepMask/configs/deepmask_tiny", "InstanceFCN/configs/instance_fcn_tiny"]
)
def test_proposals_are_exported(name, tmp_path):
    """With the configs that they are trained by, of images without annotations."""
    cfg = quick_config(ROOT / f"projects/{name}.yaml", tmp_path)
    job = ProposalFilesJob(cfg, images_of_dataset("quick_val"), tmp_path / "proposals")
    job.start(resume=False)
    job.run(build_model(cfg))
    assert job.collect_if_complete().images == 2


# Configs of FreeSOLO and of what is built on it, whose weights are the same.
FREESOLO = [p for p in CONFIGS if load_config(str(p)).MODEL.META_ARCHITECTURE in ARCHITECTURES]


def build_empty(path, *opts):
    with torch.device("meta"):
        return build_model(load_config(str(path), ["MODEL.DEVICE", "meta", *opts]))


@pytest.mark.parametrize("path", FREESOLO, ids=lambda p: p.name)
def test_freesolo_builds_whole(path):
    cfg, model = load_config(str(path)), build_empty(path)
    assert isinstance(model, FreeSOLO)
    state = model.state_dict()
    if cfg.MODEL.RESNETS.DEPTH in RELEASED:
        values = sum(x.numel() for x in state.values())
        # They have two classes.
        values += (2 - cfg.MODEL.FREESOLO.NUM_CLASSES) * state["ins_head.cate_pred.weight"][
            0
        ].numel()
        assert (len(state), round(values / 1e6, 2)) == RELEASED[cfg.MODEL.RESNETS.DEPTH]


# Millions of weights of the nets of the papers, without what FrozenBN keeps.
PROPOSAL_NETS = {
    "deepmask_R_50.yaml": 17.33,
    "deepmask_VGG_A.yaml": 75.84,
    "instance_fcn_VGG_16_voc.yaml": 17.45,
}


@pytest.mark.parametrize(
    "path",
    [p for p in CONFIGS if p.parents[1].name in ("DeepMask", "InstanceFCN")],
    ids=lambda p: p.name,
)
def test_proposal_nets_build_whole(path):
    """With the sizes that test_config_runs replaces."""
    model = build_empty(path)
    if path.name in PROPOSAL_NETS:
        weights = sum(x.numel() for x in model.parameters())
        assert round(weights / 1e6, 2) == PROPOSAL_NETS[path.name]


@pytest.mark.parametrize("name", ["tiny", "R_50", "R_101"])
def test_exemplar_freesolo_has_the_weights_of_freesolo(name):
    projects = ROOT / "projects"
    ours, theirs = (
        build_empty(projects / path).state_dict()
        for path in (
            f"ExemplarFreeSOLO/configs/exemplar_freesolo_{name}.yaml",
            f"FreeSOLO/configs/freesolo_{name}.yaml",
        )
    )
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.items()
    ]


def test_freesolo_presets():
    """The preset "compat" differs from "paper" in these keys alone."""
    folder = ROOT / "projects/FreeSOLO/configs"
    for depth in (50, 101):
        paper = load_config(str(folder / f"freesolo_R_{depth}.yaml")).clone()
        compat = load_config(str(folder / f"freesolo_R_{depth}_compat.yaml"))
        assert depth == paper.MODEL.RESNETS.DEPTH
        assert paper != compat
        paper.defrost()
        paper.merge_from_list(
            ["MODEL.FREESOLO.COMPAT", True, "MODEL.FREESOLO.NUM_CLASSES", 2]
            + ["MODEL.FREESOLO.LOSS.SEMANTIC_WEIGHT", 0.0]
            + ["MODEL.FREESOLO.DATA.BOXES", "xyxy_as_xywh"]
        )
        assert paper == compat


@pytest.mark.parametrize("resume", [False, True])
def test_crops_are_seen_by_the_named_network(tmp_path, resume):
    """A training begins with CROP_WEIGHTS; one that goes on has its own."""
    path = ROOT / "projects/LongTail/configs/long_tail_paper.yaml"
    weights = {
        f"{name}.{key}": value
        for name, part in named_resnet(18)
        for key, value in part.state_dict().items()
    }
    torch.save({"model": weights}, tmp_path / "r18.pth")
    overrides = quick_overrides(path, tmp_path)
    overrides["MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS"] = str(tmp_path / "r18.pth")
    cfg = load_config(str(path), words(overrides))
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    own = trainer.model.roi_heads.embedding_head.encoder.stages
    assert torch.equal(own[0].conv1.weight, weights["stem.conv1.weight"])
    assert torch.equal(own[4][1].conv2.weight, weights["res5.1.conv2.weight"])
    if resume:
        with torch.no_grad():
            own[0].conv1.weight += 1
        trainer.checkpointer.save("model_0000000", iteration=0)
        again = Trainer(cfg)
        again.resume_or_load(True)
        stem = again.model.roi_heads.embedding_head.encoder.stages[0]
        assert torch.equal(stem.conv1.weight, weights["stem.conv1.weight"] + 1)


def named_resnet(depth):
    """Detectron2's parts of a ResNet and their names, with random weights."""
    yield "stem", BasicStem(norm="FrozenBN")
    for number, stage in enumerate(ResNet.make_default_stages(depth, norm="FrozenBN"), start=2):
        yield f"res{number}", torch.nn.Sequential(*stage)
