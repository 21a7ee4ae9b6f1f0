"""Recall of proposals on registered data sets, against pycocotools and a toy counted by hand."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from coco_cases import official_recall, random_case, refuse_to_paste_all, windows_of
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.config import get_cfg
from unseg.evaluation import EVALUATORS, ProposalRecallEvaluator, build_evaluator
from unseg.evaluation.recall import AUC_COUNTS
from unseg.layers.packed_masks import pack_masks
from unseg.structures import WindowMasks, encode_masks

SIZE = (128, 160)
MASKS, BOXES = "segm_proposals", "box_proposals_coco"
KEYS = [
    *("AR@10", "AR@100", "AR@1000"),
    *("AUC", "AUCs", "AUCm", "AUCl"),
    *("ARs@1000", "ARm@1000", "ARl@1000"),
]


def dataset_dicts(coco_gt):
    """Detectron2's form of a COCO file, areas kept."""
    return [
        {key: image[key] for key in ("height", "width")}
        | {
            "image_id": image["id"],
            "annotations": [
                a | {"bbox_mode": BoxMode.XYWH_ABS}
                for a in coco_gt["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in coco_gt["images"]
    ]


def as_outputs(results, images):
    """Inputs and outputs of a model for results in COCO's form, images without any among them."""
    for image in images:
        own = [r for r in results if r["image_id"] == image["id"]]
        xywh = torch.tensor([r["bbox"] for r in own]).reshape(-1, 4)
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        instances.scores = torch.tensor([r["score"] for r in own], dtype=torch.float64)
        instances.pred_masks = [r["segmentation"] for r in own]
        instances.pred_classes = torch.tensor([r["category_id"] for r in own]).long()
        yield {"image_id": image["id"]}, {"instances": instances}


def with_rounded_boxes(results, pairs):
    """The results with the float32 boxes that the model's output holds."""
    rounded = []
    for record, output in pairs:
        corners = output["instances"].pred_boxes.tensor.numpy()
        own = [r for r in results if r["image_id"] == record["image_id"]]
        for result, (x0, y0, x1, y1) in zip(own, corners):
            box = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            rounded.append(result | {"bbox": box})
    return rounded


def run(evaluator, pairs):
    evaluator.reset()
    for record, output in pairs:
        evaluator.process([record], [output])
    return evaluator.evaluate()


def expected_numbers(coco_gt, results, task):
    recall = 100 * official_recall(coco_gt, results, task, sorted({*AUC_COUNTS, 10, 100, 1000}))
    assert recall.shape == (4, 28)
    steps = np.diff(np.log10(AUC_COUNTS))
    areas = ((recall[:, 1:] + recall[:, :-1]) / 2 * steps).sum(1) / 3
    at = [recall[0, AUC_COUNTS.index(cap)] for cap in (10, 100, 1000)]
    return [*at, *areas, *recall[1:, -1]]


def compare(seed):
    coco_gt, results = random_case(seed)
    DatasetCatalog.register("toy_random", lambda: dataset_dicts(coco_gt))
    try:
        evaluator = ProposalRecallEvaluator("toy_random")
    finally:
        DatasetCatalog.remove("toy_random")
    pairs = list(as_outputs(results, coco_gt["images"]))
    numbers = run(evaluator, pairs)
    assert list(numbers) == [BOXES, MASKS]
    results = with_rounded_boxes(results, pairs)
    for key, task in ((BOXES, "bbox"), (MASKS, "segm")):
        assert list(numbers[key]) == KEYS
        np.testing.assert_allclose(
            list(numbers[key].values()),
            expected_numbers(coco_gt, results, task),
            rtol=0,
            atol=1e-9,
        )


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_equals_pycocotools(seed):
    """80 classes, tied scores and IoUs, crowds, areas on the borders, empty images."""
    compare(seed)


def rectangle(x, y, w, h):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[y : y + h, x : x + w] = True
    return mask


OBJECTS = {7: [(10, 10, 20, 20), (60, 20, 50, 40), (0, 0, 160, 64)], 3: [(5, 5, 30, 30)]}
PROPOSALS = [(10, 10, 20, 16), (60, 20, 50, 40), (0, 0, 160, 40)]


def toy_dicts(objects=OBJECTS, masks=True):
    return [
        {
            "image_id": image_id,
            "height": SIZE[0],
            "width": SIZE[1],
            "annotations": [
                {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": n}
                | ({"segmentation": encode_masks(rectangle(*box)[None])[0]} if masks else {})
                for n, box in enumerate(boxes)
            ],
        }
        for image_id, boxes in objects.items()
    ]


def output(boxes=PROPOSALS, **fields):
    """Mask proposals by falling score."""
    instances = Instances(SIZE)
    instances.pred_masks = torch.stack([torch.zeros(SIZE).bool(), *(rectangle(*b) for b in boxes)])[
        1:
    ]
    instances.scores = torch.linspace(1, 0, len(boxes))
    for name, value in fields.items():
        instances.set(name, value)
    return {"instances": instances}


def box_proposals(boxes=PROPOSALS):
    """What a stock proposal generator gives."""
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)
    proposals = Instances(SIZE)
    proposals.proposal_boxes = Boxes(corners.float())
    proposals.objectness_logits = torch.linspace(3, -3, len(boxes))
    return {"proposals": proposals}


def test_toy_counted_by_hand(register):
    """Specification 3.3; the image without proposals counts, whether it was processed or not."""
    evaluator = ProposalRecallEvaluator(register(toy_dicts()), caps=(2, 1, 10))
    first = ({"image_id": 7}, output())
    for pairs in ([first], [first, ({"image_id": 3}, output([]))]):
        results = run(evaluator, pairs)
        assert list(results) == [BOXES, MASKS]
        for numbers in results.values():
            assert numbers["AR@1"] == pytest.approx(100 * 7 / 40)
            assert numbers["AR@2"] == pytest.approx(100 * 17 / 40)
            assert numbers["AR@10"] == pytest.approx(50)
            assert numbers["ARs@10"] == pytest.approx(35)
            assert numbers["ARm@10"] == pytest.approx(100)
            assert numbers["ARl@10"] == pytest.approx(30)
            # A step at 1, one at 2, one at 3: log10 n between them.
            one, two, three = np.log10([1, 2, 3])
            area = (7 + 17) / 2 * (two - one) + (17 + 20) / 2 * (three - two) + 20 * (3 - three)
            assert numbers["AUC"] == pytest.approx(100 / 40 * area / 3)


def test_forms_of_masks(register):
    """Proposals are sorted by their scores, whatever form the masks have."""
    evaluator = ProposalRecallEvaluator(register(toy_dicts()), caps=(1, 10))
    masks = output()["instances"].pred_masks.flip(0)
    expected = str(run(evaluator, [({"image_id": 7}, output())]))
    scores = torch.tensor([-2.0, 0.5, 7.0])
    forms = (masks, BitMasks(masks), masks.byte(), masks.numpy(), encode_masks(masks))
    for form in (*forms, pack_masks(masks), pack_masks(encode_masks(masks))):
        got = run(evaluator, [({"image_id": 7}, output(pred_masks=form, scores=scores))])
        assert str(got) == expected


def test_masks_of_windows(register, monkeypatch):
    evaluator = ProposalRecallEvaluator(register(toy_dicts()), caps=(1, 10))
    expected = str(run(evaluator, [({"image_id": 7}, output())]))
    windows = windows_of(output()["instances"].pred_masks)
    refuse_to_paste_all(monkeypatch)
    found = output(pred_masks=windows)
    assert str(run(evaluator, [({"image_id": 7}, found)])) == expected
    with pytest.raises(ValueError, match=r"pred_masks are \(64, 64\)"):
        small = WindowMasks(windows.probabilities, windows.boxes, (64, 64))
        run(evaluator, [({"image_id": 7}, output(pred_masks=small))])


def test_an_output_with_both_is_taken_once(register):
    """As proposal methods give it; the instances, which here differ from the proposals."""
    evaluator = ProposalRecallEvaluator(register(toy_dicts()), caps=(2, 1, 10))
    both = box_proposals([(90, 90, 5, 5)] * 7) | output()
    evaluator.process([{"image_id": 7}], [both])
    assert {k: v.proposals for k, v in evaluator._matches.items()} == {7: len(PROPOSALS)}
    assert evaluator.evaluate() == run(evaluator, [({"image_id": 7}, output())])


def test_stock_proposals(register, caplog):
    """Boxes only: no masks are evaluated."""
    evaluator = ProposalRecallEvaluator(register(toy_dicts()), caps=(2,))
    with caplog.at_level(logging.INFO):
        results = run(evaluator, [({"image_id": 7}, box_proposals())])
    assert list(results) == [BOXES]
    assert results[BOXES]["AR@2"] == pytest.approx(100 * 17 / 40)
    assert "1 of 2 images of toy were not processed" in caplog.text
    assert "2 images, 4 objects without crowds, 3 proposals" in caplog.text


def test_boxes_alone_in_the_ground_truth(register, caplog):
    name = register(toy_dicts(masks=False))
    assert list(run(ProposalRecallEvaluator(name), [({"image_id": 7}, output())])) == [BOXES]
    assert "4 of 4 objects of toy have boxes only" in caplog.text
    with pytest.raises(ValueError, match="no segmentation"):
        ProposalRecallEvaluator(name, tasks=("segm",))


def test_only_crowds_or_nothing(register):
    """Nothing to find: NaN, not 0."""
    dicts = toy_dicts()
    for annotation in dicts[0]["annotations"]:
        annotation["iscrowd"] = 1
    dicts[1]["annotations"] = []
    evaluator = ProposalRecallEvaluator(register(dicts))
    results = run(evaluator, [({"image_id": k}, output()) for k in (7, 3)])
    assert list(results) == [BOXES, MASKS]
    assert all(np.isnan(v) for numbers in results.values() for v in numbers.values())


def test_no_proposals_at_all(register):
    evaluator = ProposalRecallEvaluator(register(toy_dicts()))
    results = run(evaluator, [({"image_id": k}, output([])) for k in (7, 3)])
    assert results[MASKS] == results[BOXES] == dict.fromkeys(KEYS, 0.0)
    assert list(run(evaluator, [])) == [BOXES]


def test_degenerate_masks(register):
    """Empty proposals and empty objects overlap nothing, and take a rank."""
    name = register(toy_dicts({1: [(0, 0, 40, 40), (9, 9, 0, 0)]}))
    evaluator = ProposalRecallEvaluator(name, caps=(1, 2))
    boxes = [(0, 0, 0, 0), (0, 0, 40, 40)]
    for numbers in run(evaluator, [({"image_id": 1}, output(boxes))]).values():
        assert (numbers["AR@1"], numbers["AR@2"]) == (0, 50)


def test_memory_is_of_objects_not_of_proposals(register):
    evaluator = ProposalRecallEvaluator(register(toy_dicts()))
    sizes = []
    for count in (3, 1500):
        evaluator.reset()
        boxes = box_proposals((PROPOSALS * count)[:count])
        evaluator.process([{"image_id": 7}], [boxes])
        sizes.append(len(pickle.dumps(evaluator._matches)))
    assert sizes[1] - sizes[0] < 16


def test_more_than_the_largest_cap(register):
    """The grid of the area ends at 1000, but caps may be above it."""
    name = register(toy_dicts())
    boxes = [(100, 100, 5, 5)] * 1200 + PROPOSALS
    for caps, found in (((1000,), 0.0), ((10, 1203), 50.0)):
        results = run(
            ProposalRecallEvaluator(name, caps=caps), [({"image_id": 7}, box_proposals(boxes))]
        )
        assert results[BOXES][f"AR@{caps[-1]}"] == pytest.approx(found)
        assert results[BOXES]["AUC"] == 0


@pytest.mark.parametrize(
    ("image_id", "bad", "message"),
    [
        (7, {}, "image 7: the output has neither"),
        (99, output(), "image 99 is not in toy"),
        (7, output(scores=torch.tensor([1, float("nan"), 0])), "image 7: scores"),
        (7, output(pred_masks=torch.zeros(3, 8, 8).bool()), r"image 7: pred_masks are \(8, 8\)"),
        (7, output(pred_masks=torch.zeros(3, *SIZE)), "image 7: pred_masks: .*threshold"),
        (7, output(pred_masks=[1, 2, 3]), "image 7: pred_masks"),
        (7, output(pred_boxes=Boxes(torch.full((3, 4), torch.inf))), "image 7: boxes"),
        (7, {"instances": Instances(SIZE)}, "image 7: proposals need scores"),
        (7, {"instances": Instances((8, 8), scores=torch.ones(1))}, "image 7: proposals need"),
    ],
)
def test_bad_proposals(register, image_id, bad, message):
    evaluator = ProposalRecallEvaluator(register(toy_dicts()))
    with pytest.raises(ValueError, match=message):
        evaluator.process([{"image_id": image_id}], [bad])


def test_proposals_of_another_size_than_the_image(register):
    evaluator = ProposalRecallEvaluator(register(toy_dicts()))
    small = Instances((8, 8), scores=torch.ones(1), pred_masks=torch.ones(1, 8, 8).bool())
    with pytest.raises(ValueError, match=r"image 7: pred_masks are \(8, 8\), the image is \(128"):
        evaluator.process([{"image_id": 7}], [{"instances": small}])


def test_masks_of_some_images_only(register):
    name = register(toy_dicts())
    pairs = [({"image_id": 7}, output()), ({"image_id": 3}, box_proposals())]
    with pytest.raises(ValueError, match="of 1 of 2 images have no masks, image 3 is one"):
        run(ProposalRecallEvaluator(name), pairs)
    assert list(run(ProposalRecallEvaluator(name, tasks=("bbox",)), pairs)) == [BOXES]
    with pytest.raises(ValueError, match="image 3: the proposals have no masks"):
        run(ProposalRecallEvaluator(name, tasks=("segm",)), pairs)


def test_bad_arguments(register):
    name = register(toy_dicts())
    with pytest.raises(KeyError, match="no_such"):
        ProposalRecallEvaluator("no_such")
    with pytest.raises(ValueError, match="tasks must be"):
        ProposalRecallEvaluator(name, tasks=("keypoints",))
    with pytest.raises(ValueError, match="caps must be"):
        ProposalRecallEvaluator(name, caps=(0,))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["TEST.DETECTIONS_PER_IMAGE", 100], "TEST.DETECTIONS_PER_IMAGE 100 is"),
        (["TEST.DETECTIONS_PER_IMAGE", 1000], None),
        (["TEST.DETECTIONS_PER_IMAGE", 100, "TEST.PROPOSALS.CAPS", (10, 100)], None),
        (["TEST.DETECTIONS_PER_IMAGE", -1], None),  # no limit
        (["MODEL.META_ARCHITECTURE", "DeepMask"], None),
        (
            ["MODEL.META_ARCHITECTURE", "SharpMask", "MODEL.DEEPMASK.TEST.TOPK", 500],
            "MODEL.DEEPMASK.TEST.TOPK 500 is",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "InstanceFCN", "MODEL.INSTANCE_FCN.TEST.TOPK", 7],
            "MODEL.INSTANCE_FCN.TEST.TOPK 7 is",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.POST_NMS_TOPK_TEST", 300],
            "MODEL.RPN.POST_NMS_TOPK_TEST 300 is",
        ),
        (
            [
                *("MODEL.META_ARCHITECTURE", "ProposalNetwork"),
                *("MODEL.PROPOSAL_GENERATOR.NAME", "InstanceFCNProposalGenerator"),
                *("MODEL.RPN.POST_NMS_TOPK_TEST", 300, "MODEL.INSTANCE_FCN.TEST.TOPK", 400),
            ],
            "MODEL.INSTANCE_FCN.TEST.TOPK 400 is",
        ),
    ],
)
def test_caps_of_the_config(register, caplog, options, key):
    """With a warning if the model gives fewer proposals than are asked for."""
    cfg = get_cfg()
    cfg.merge_from_list(options)
    evaluator = ProposalRecallEvaluator(cfg, register(toy_dicts()))
    numbers = run(evaluator, [({"image_id": 7}, output())])[MASKS]
    assert [k for k in numbers if k.startswith("AR@")] == [
        f"AR@{cap}" for cap in cfg.TEST.PROPOSALS.CAPS
    ]
    warnings = [r.getMessage() for r in caplog.records if "TEST.PROPOSALS.CAPS" in r.getMessage()]
    assert len(warnings) == (key is not None)
    assert all(key in text for text in warnings)


def test_bad_caps_of_the_config(register):
    cfg = get_cfg()
    name = register(toy_dicts())
    for caps in ((), (0,)):
        cfg.TEST.PROPOSALS.CAPS = caps
        with pytest.raises(ValueError, match="caps must be"):
            ProposalRecallEvaluator(cfg, name)


def test_from_config_beside_the_other_evaluator(register):
    """Its keys are its own, so DatasetEvaluators takes both."""
    cfg = get_cfg()
    cfg.TEST.EVALUATORS = ("ClassAgnosticCOCOEvaluator", "ProposalRecallEvaluator")
    cfg.OUTPUT_DIR = ""
    assert EVALUATORS.get("ProposalRecallEvaluator") is ProposalRecallEvaluator
    name = register(toy_dicts())
    evaluators = build_evaluator(cfg, name)
    evaluators._evaluators[0]._output_dir = None
    evaluators.reset()
    for image_id in (7, 3):
        evaluators.process([{"image_id": image_id}], [output()])
    results = evaluators.evaluate()
    assert list(results) == ["bbox", "segm", BOXES, MASKS]
    # Two independent ways to one number.
    assert results[MASKS]["AR@100"] == pytest.approx(results["segm"]["AR@100"], abs=1e-9)


def evaluate_images(mine):
    """Results of a process that sees some of the images; the images are not alike."""
    objects = {n: [(4 * n, 3, 20 + n, 30), (60, 60, 50, 40 + n)][: n % 3] for n in range(7)}
    DatasetCatalog.register("toy_ranks", lambda: toy_dicts(objects))
    evaluator = ProposalRecallEvaluator("toy_ranks")
    for n in mine:
        boxes = [(4 * n, 3, 20, 25), (60, 60, 50, 35), (61, 60, 50, 41)][: 1 + n % 3]
        evaluator.process([{"image_id": n}], [output(boxes)])
    results = evaluator.evaluate()
    DatasetCatalog.remove("toy_ranks")
    return results


def evaluate_on_rank(rank, folder):
    """One of two processes; the image in the middle goes to both."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = evaluate_images((range(4), range(3, 7))[rank])
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_ranks(tmp_path):
    """Two processes give what one gives; only the main one has numbers."""
    expected = evaluate_images(range(7))
    assert 0 < expected[MASKS]["AR@10"] < 100
    assert expected != evaluate_images(range(4))
    mp.start_processes(evaluate_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert (tmp_path / "0.json").read_text() == json.dumps(expected)
    assert (tmp_path / "1.json").read_text() == "{}"
