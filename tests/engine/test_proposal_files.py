"""Proposals of a data set as files: complete, the same for any number of processes, and read by
Detectron2 and pycocotools."""

import contextlib
import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from quick_rcnn import CONFIG, QUICK
from toy_proposer import (
    EMPTY,
    IDS,
    YAML,
    ToyProposer,
    objects_of,
    proposals_for,
    rectangle,
    size_of,
    write_dataset,
)

from unseg.config import load_config
from unseg.engine import ProposalFilesJob, Trainer, images_of_dataset
from unseg.engine.proposal_files import proposals_of
from unseg.evaluation import ProposalRecallEvaluator
from unseg.evaluation.recall import AUC_COUNTS
from unseg.structures import WindowMasks, encode_masks

MASK_FILES = [f"mask_proposals-{n:05d}.json" for n in range(3)]
ALL_FILES = {*MASK_FILES, "box_proposals.pkl", "manifest.json"}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Seven images make three files."""
    monkeypatch.setattr(ProposalFilesJob, "block", 3)


@pytest.fixture
def dataset(tmp_path, register):
    (tmp_path / "images").mkdir()
    dicts = write_dataset(tmp_path / "images")
    # Copies, because loading proposals writes into them.
    return register(lambda: copy.deepcopy(dicts), thing_classes=["thing"])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "toy.yaml").write_text(YAML)
    cfg = load_config(str(tmp_path / "toy.yaml"), [])
    cfg.defrost()
    return cfg


def make_job(config, dataset, output):
    return ProposalFilesJob(config, images_of_dataset(dataset), output, origin={"dataset": dataset})


def run(config, dataset, output, model=None, shards=1):
    model = model or ToyProposer()
    job = make_job(config, dataset, output)
    job.start(resume=False)
    units = job.work_dir.missing()
    for shard in range(shards):
        job.run(model, units[shard::shards], name=str(shard))
    return job.collect_if_complete()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_boxes(folder):
    with open(folder / "box_proposals.pkl", "rb") as file:
        return pickle.load(file)


def load_masks(folder):
    parts = [json.loads((folder / name).read_text()) for name in MASK_FILES]
    return parts, [result for part in parts for result in part]


def test_every_image_with_its_own_proposals(config, dataset, tmp_path):
    counts = run(config, dataset, tmp_path / "x")
    assert {p.name for p in (tmp_path / "x").iterdir()} == ALL_FILES
    assert not (tmp_path / "x.parts").exists()
    boxes = load_boxes(tmp_path / "x")
    parts, results = load_masks(tmp_path / "x")
    assert set(boxes) == {"ids", "boxes", "objectness_logits", "bbox_mode"}
    assert boxes["ids"] == IDS
    assert boxes["bbox_mode"] == BoxMode.XYXY_ABS
    for n, image_id in enumerate(IDS):
        expected, logits = proposals_for(image_id)
        order = sorted(range(len(logits)), key=lambda i, x=logits: -x[i])  # stable
        for found, truth in (
            (boxes["boxes"][n], expected[order].astype(np.float32)),
            (boxes["objectness_logits"][n], logits[order]),
        ):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, truth)
        own = [r for r in results if r["image_id"] == image_id]
        assert len(own) == len(order)
        for result, i in zip(own, order):
            assert set(result) == {"image_id", "category_id", "score", "segmentation"}
            assert result["category_id"] == 1
            assert result["score"] == pytest.approx(1 / (1 + np.exp(-float(logits[i]))), rel=1e-12)
            mask = mask_util.decode(result["segmentation"])
            np.testing.assert_array_equal(mask, rectangle(expected[i], size_of(image_id)))
    # Images of a file are those of the data set, in its order.
    in_order = [list(dict.fromkeys(r["image_id"] for r in part)) for part in parts]
    assert in_order == [IDS[:3], [i for i in IDS[3:6] if i != EMPTY], IDS[6:]]
    proposals = sum(len(proposals_for(i)[0]) for i in IDS)
    assert (counts.images, counts.proposals, counts.mask_files) == (7, proposals, 3)
    assert (counts.images_without_proposals, counts.unreadable_images) == (1, 0)


def test_the_manifest_says_what_they_are_of(config, dataset, tmp_path):
    run(config, dataset, tmp_path / "x")
    manifest = json.loads((tmp_path / "x/manifest.json").read_text())
    assert manifest["model"] == "ToyProposer"
    assert manifest["dataset"] == dataset
    assert manifest["masks"] == MASK_FILES
    assert manifest["counts"]["images"] == 7
    assert manifest["unseg"]["settings"]["DISCOVERY"]["BATCH_SIZE"] == 2


def test_any_number_of_shards_gives_the_same_bytes(config, dataset, tmp_path):
    for shards in (1, 2, 5):
        run(config, dataset, tmp_path / str(shards), shards=shards)
    files = [bytes_of(tmp_path / str(shards)) for shards in (1, 2, 5)]
    assert files[0].keys() == ALL_FILES
    assert files[0] == files[1] == files[2]


class Dying(ToyProposer):
    """Ends the process' work in its third batch."""

    def forward(self, inputs):
        if len(self.batches) == 2:
            raise KeyboardInterrupt
        return super().forward(inputs)


def test_killed_and_resumed_gives_the_same_bytes(config, dataset, tmp_path):
    run(config, dataset, tmp_path / "whole")
    job = make_job(config, dataset, tmp_path / "x")
    job.start(resume=True)
    with pytest.raises(KeyboardInterrupt):
        job.run(Dying())
    (shard,) = job.work_dir.path.glob("shard-*")
    with open(shard, "ab") as file:
        file.write(b'{"unit":2,"result":{"5')  # in the middle of a line
    assert not (tmp_path / "x").exists()
    assert job.collect_if_complete() is None
    again = make_job(config, dataset, tmp_path / "x")
    again.start(resume=True)
    model = ToyProposer()
    again.run(model)
    # Batches end where a file does: 2 + 1 images, 2 + 1 and 1, of which two batches are done.
    assert sorted(len(batch) for batch in model.batches) == [1, 1, 2]
    again.collect_if_complete()
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")


def test_killed_while_writing_the_files(config, dataset, tmp_path, monkeypatch):
    run(config, dataset, tmp_path / "x")
    whole = bytes_of(tmp_path / "x")
    (tmp_path / "x/mask_proposals-00007.json").write_text("[]")  # of a larger data set
    job = make_job(config, dataset, tmp_path / "x")
    job.start(resume=False)
    job.run(ToyProposer())
    assert job.is_written()
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "dump", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.collect_if_complete()
    assert not job.is_written()
    assert {p.name for p in (tmp_path / "x").iterdir()} == ALL_FILES - {"box_proposals.pkl"}
    again = make_job(config, dataset, tmp_path / "x")
    again.start(resume=True)
    again.collect_if_complete()
    assert again.is_written()
    assert bytes_of(tmp_path / "x") == whole


def test_written_files_are_recognised_by_their_settings(config, dataset, tmp_path):
    assert not make_job(config, dataset, tmp_path / "x").is_written()
    run(config, dataset, tmp_path / "x")
    assert make_job(config, dataset, tmp_path / "x").is_written()
    config.INPUT.MIN_SIZE_TEST = 40
    assert not make_job(config, dataset, tmp_path / "x").is_written()
    config.INPUT.MIN_SIZE_TEST = 32
    (tmp_path / "x/mask_proposals-00001.json").unlink()
    assert not make_job(config, dataset, tmp_path / "x").is_written()


@pytest.mark.parametrize("form", ["bits", "packed", "rle", "windows"])
def test_masks_of_every_form_are_the_same(config, dataset, tmp_path, form):
    run(config, dataset, tmp_path / "bool")
    run(config, dataset, tmp_path / form, ToyProposer(form))
    assert bytes_of(tmp_path / form) == bytes_of(tmp_path / "bool")


def test_a_model_of_boxes_alone(config, dataset, tmp_path):
    run(config, dataset, tmp_path / "x", ToyProposer())
    boxes = (tmp_path / "x/box_proposals.pkl").read_bytes()
    counts = run(config, dataset, tmp_path / "x", ToyProposer("none"))
    assert counts.mask_files == 0
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"box_proposals.pkl", "manifest.json"}
    assert (tmp_path / "x/box_proposals.pkl").read_bytes() == boxes
    assert make_job(config, dataset, tmp_path / "x").is_written()


class Sometimes(ToyProposer):
    def propose(self, x):
        instances = super().propose(x)
        if x["image_id"] == 9:
            instances.remove("pred_masks")
        return instances


def test_masks_of_some_images_only(config, dataset, tmp_path):
    with pytest.raises(ValueError, match="of 5 images have masks, those of 1 do not"):
        run(config, dataset, tmp_path / "x", Sometimes())
    assert list((tmp_path / "x").iterdir()) == []


class OneLess(ToyProposer):
    def forward(self, inputs):
        return super().forward(inputs)[1:]


class NoProposals(ToyProposer):
    def forward(self, inputs):
        return [{"sem_seg": None} if x["image_id"] == 9 else y
                for x, y in zip(inputs, super().forward(inputs))]  # fmt: skip


def test_an_image_without_an_entry_is_an_error(config, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"1 outputs for 2 images: .*\.png, .*\.png"):
        run(config, dataset, tmp_path / "x", OneLess())
    with pytest.raises(ValueError, match=r"5\.png: the output has neither .* but \['sem_seg'\]"):
        run(config, dataset, tmp_path / "x", NoProposals())
    assert not (tmp_path / "x").exists()


def test_images_that_cannot_be_read(config, dataset, tmp_path):
    (tmp_path / "images/1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"1\.png"):
        run(config, dataset, tmp_path / "x")
    config.INPUT.ON_BAD_IMAGE = "skip"
    counts = run(config, dataset, tmp_path / "x")
    assert (counts.images_without_proposals, counts.unreadable_images) == (2, 1)
    boxes = load_boxes(tmp_path / "x")
    assert boxes["ids"] == IDS
    assert boxes["boxes"][1].shape == (0, 4)


def test_ids_must_be_unique(config, dataset, register):
    dicts = DatasetCatalog.get(dataset)
    twice = register([*dicts, dicts[0]], "twice")
    with pytest.raises(ValueError, match="not unique"):
        make_job(config, twice, "x")


def instances_of(size=(20, 30), **fields):
    result = Instances(size)
    for name, value in fields.items():
        result.set(name, value)
    return {"instances": result}


def two_masks(size=(20, 30)):
    return torch.stack([rectangle((2, 3, 12, 9), size), rectangle((20, 10, 30, 20), size)])


def test_probabilities_become_logits():
    p = torch.tensor([0.25, 1.0, 0.0, 0.75])
    output = instances_of(scores=p, pred_boxes=Boxes(torch.arange(16.0).reshape(4, 4)))
    found = proposals_of(output, (20, 30))
    assert found.scores.tolist() == [1.0, 0.75, 0.25, 0.0]
    limit = np.log((1 - 1e-7) / 1e-7)
    expected = [limit, np.log(3), -np.log(3), -limit]
    np.testing.assert_allclose(found.logits, expected, rtol=1e-6)
    assert found.boxes[:, 0].tolist() == [4, 12, 0, 8]
    assert found.masks is None
    # Beyond the limit the probabilities still decide.
    near = torch.tensor([1 - 1e-9, 1 - 1e-10], dtype=torch.float64)
    output = instances_of(scores=near, pred_boxes=Boxes(torch.tensor([[0.0] * 4, [1.0] * 4])))
    assert proposals_of(output, (20, 30)).boxes[:, 0].tolist() == [1, 0]


def test_boxes_of_masks_and_proposals_before_instances():
    output = instances_of(scores=torch.tensor([0.1, 0.9]), pred_masks=two_masks())
    found = proposals_of(output, (20, 30))
    assert found.boxes.tolist() == [[20, 10, 30, 20], [2, 3, 12, 9]]
    output["proposals"] = instances_of(
        objectness_logits=torch.tensor([3.0]), proposal_boxes=Boxes(torch.ones(1, 4))
    )["instances"]
    assert proposals_of(output, (20, 30)).logits.tolist() == [3.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pred_masks": two_masks()}, "need objectness_logits or scores"),
        ({"scores": torch.tensor([0.5, 0.5])}, "need boxes or masks; they have"),
        ({"scores": torch.tensor([0.5, 1.5]), "pred_masks": two_masks()}, "probabilities"),
        ({"scores": torch.tensor([0.5, torch.nan]), "pred_masks": two_masks()}, "finite"),
        ({"scores": torch.tensor([[0.5], [0.5]]), "pred_masks": two_masks()}, "vector"),
        (
            {"scores": torch.tensor([0.5]), "pred_boxes": Boxes(torch.full((1, 4), torch.inf))},
            "NaN/inf",
        ),
        (
            {"scores": torch.tensor([0.5, 0.5]), "pred_masks": two_masks((20, 31))},
            r"\(20, 31\), the image is \(20, 30\)",
        ),
        (
            {"scores": torch.tensor([0.5] * 2), "pred_masks": encode_masks(two_masks((20, 31)))},
            r"\[20, 31\], its image \[20, 30\]",
        ),
        (
            {
                "scores": torch.tensor([0.5]),
                "pred_masks": WindowMasks(
                    torch.ones(1, 2, 2), torch.tensor([[1.0, 1, 9, 9]]), (20, 31)
                ),
            },
            r"\(20, 31\), the image is \(20, 30\)",
        ),
    ],
)
def test_outputs_that_cannot_be_written(fields, message):
    with pytest.raises(ValueError, match=message):
        proposals_of(instances_of(**fields), (20, 30))


def test_outputs_of_another_size():
    output = instances_of((10, 15), scores=torch.zeros(0), pred_boxes=Boxes(torch.zeros(0, 4)))
    with pytest.raises(ValueError, match=r"of an image of \(10, 15\), it is \(20, 30\)"):
        proposals_of(output, (20, 30))


def test_detectron2_reads_the_boxes(config, dataset, tmp_path):
    run(config, dataset, tmp_path / "x")
    dicts = DatasetCatalog.get(dataset)
    load_proposals_into_dataset(dicts, str(tmp_path / "x/box_proposals.pkl"))
    for record in dicts:
        expected, logits = proposals_for(record["image_id"])
        assert record["proposal_bbox_mode"] == BoxMode.XYXY_ABS
        found = np.column_stack(
            [record["proposal_objectness_logits"], record["proposal_boxes"].reshape(-1, 4)]
        )
        truth = np.column_stack([logits, expected.reshape(-1, 4)])
        assert (np.diff(record["proposal_objectness_logits"]) <= 0).all()
        np.testing.assert_array_equal(sorted(found.tolist()), sorted(truth.tolist()))


def test_a_stock_fast_rcnn_trains_on_them(config, dataset, tmp_path):
    run(config, dataset, tmp_path / "x")
    changes = QUICK | {
        "MODEL.DEVICE": "cpu",
        "MODEL.MASK_ON": False,
        "MODEL.LOAD_PROPOSALS": True,
        "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
        "DATASETS.TRAIN": (dataset,),
        "DATASETS.PROPOSAL_FILES_TRAIN": (str(tmp_path / "x/box_proposals.pkl"),),
        "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 15,
        "DATASETS.TEST": (),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "SOLVER.IMS_PER_BATCH": 7,
        "SOLVER.MAX_ITER": 2,
        "VIS_PERIOD": 0,
        "OUTPUT_DIR": str(tmp_path),
    }
    cfg = load_config(str(CONFIG), [x for item in changes.items() for x in item])
    trainer = Trainer(cfg)
    assert type(trainer.model).__module__ == "detectron2.modeling.meta_arch.rcnn"
    assert trainer.model.proposal_generator is None
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert {x["image_id"]: len(x["proposals"]) for x in batch} == {
        i: min(15, len(proposals_for(i)[0])) for i in IDS
    }
    before = trainer.model.roi_heads.box_predictor.bbox_pred.weight.clone()
    trainer.train()
    last = {key: value for key, (value, _) in trainer.storage.latest().items()}
    assert trainer.storage.latest()["total_loss"][1] == 1  # of two iterations, from 0
    losses = {key for key in last if key.startswith("loss_")}
    assert losses == {"loss_cls", "loss_box_reg"}
    assert all(np.isfinite(last[key]) for key in losses)
    # Some proposals were near objects, or there would be nothing to learn for boxes.
    assert last["loss_box_reg"] > 0
    assert not torch.equal(before, trainer.model.roi_heads.box_predictor.bbox_pred.weight)


def coco_of(dataset):
    images, annotations = [], []
    for record in DatasetCatalog.get(dataset):
        images.append({"id": record["image_id"]} | {k: record[k] for k in ("height", "width")})
        for a in record["annotations"]:
            x0, y0, x1, y1 = a["bbox"]
            kept = {k: a[k] for k in ("segmentation", "area")}
            kept |= {"image_id": record["image_id"], "category_id": 1, "iscrowd": 0}
            kept["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(kept | {"id": len(annotations) + 1})
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "info": {}}
    coco.dataset["categories"] = [{"id": 1, "name": "thing"}]
    coco.createIndex()
    return coco


def test_pycocotools_reads_the_masks(config, dataset, tmp_path):
    """Its recall is that of our evaluator on the model's own output."""
    run(config, dataset, tmp_path / "x")
    _, results = load_masks(tmp_path / "x")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_of(dataset)
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = sorted({*AUC_COUNTS, 10, 100, 1000})
        evaluation.evaluate()
        evaluation.accumulate()
    recall = 100 * evaluation.eval["recall"][:, 0].mean(0)  # sizes, caps
    evaluator = ProposalRecallEvaluator(dataset)
    model = build_model(config).eval()
    for record in DatasetCatalog.get(dataset):
        evaluator.process([record], model([record]))
    numbers = evaluator.evaluate()["segm_proposals"]
    for cap in (10, 100, 1000):
        expected = recall[0, evaluation.params.maxDets.index(cap)]
        assert numbers[f"AR@{cap}"] == pytest.approx(expected, abs=1e-9)
    assert numbers["ARs@1000"] == pytest.approx(recall[1, -1], abs=1e-9)
    assert 10 < numbers["AR@10"] < numbers["AR@1000"] < 90
    assert sum(len(objects_of(i)) for i in IDS) == len(coco.anns)
