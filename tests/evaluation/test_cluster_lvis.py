"""ClusterLVISEvaluator: cluster, name by other images' labels, score as LVIS does."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, BoxMode, Instances
from lvis_cases import annotation, instances, lvis_content, lvis_numbers
from pycocotools import mask as mask_util
from sklearn.metrics import normalized_mutual_info_score

from unseg.config import get_cfg
from unseg.data.datasets.synthetic import register_synthetic
from unseg.data.embeddings import EmbeddingRows, EmbeddingWriter
from unseg.evaluation import ClusterLVISEvaluator, ClusterSettings, NamingSettings, build_evaluator
from unseg.evaluation.cluster_naming import fold_of_image

FOLD = {fold: [i for i in range(1, 60) if fold_of_image(i) == fold] for fold in (0, 1)}
BOXES = [[2, 2, 30, 20], [50, 10, 60, 40], [10, 60, 50, 50], [100, 70, 40, 40]]
LOOSE = NamingSettings(min_purity=0.5, min_size=1)
AGREEMENT = {"matched", "purity", "NMI", "ACC"}
SAME = NamingSettings(split="same", min_purity=0.5, min_size=1)


def scenes(categories_of_image):
    """Content in which the objects of an image are the first of BOXES."""
    annotations = []
    for image, categories in categories_of_image.items():
        for box, category in zip(BOXES, categories):
            annotations.append(annotation(len(annotations) + 1, image, category, box))
    return lvis_content(annotations, categories_of_image)


def of_content(register, tmp_path, content, name="toy"):
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(content))
    return register([], name=name, json_file=str(file))


def evaluator_of(name, naming=SAME, cluster=None, **settings):
    def arg_max(tangents):
        return tangents.argmax(1).numpy()

    return ClusterLVISEvaluator(name, cluster=cluster or arg_max, naming=naming, **settings)


def one_hot(labels, dim=8):
    return torch.nn.functional.one_hot(torch.tensor(labels, dtype=torch.int64), dim).float()


def perfect(content, **more):
    """Pairs of input and output: every object found, its cluster that of its category."""
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        tangents = one_hot([a["category_id"] for a in objects])
        fields = {"pred_tangents": tangents} | {k: v(objects) for k, v in more.items()}
        boxes = [a["bbox"] for a in objects]
        yield {"image_id": image["id"]}, {"instances": instances(boxes, **fields)}


def run(evaluator, pairs):
    evaluator.reset()
    for pair in pairs:
        evaluator.process([pair[0]], [pair[1]])
    return evaluator.evaluate()


def both_folds(per_fold=6):
    """Categories 1 to 4 in both folds; frequencies of ids are r c f r c f."""
    images = FOLD[0][:per_fold] + FOLD[1][:per_fold]
    rng = np.random.default_rng(0)
    return scenes({i: rng.permutation([1, 2, 3, 4])[: 2 + i % 3].tolist() for i in images})


@pytest.mark.parametrize("naming", [LOOSE, SAME, NamingSettings("hungarian")])
def test_perfect_detections(register, tmp_path, naming):
    content = both_folds()
    found = run(evaluator_of(of_content(register, tmp_path, content), naming), perfect(content))
    assert list(found) == ["cluster_bbox", "cluster_segm", "clusters"]
    for task in ("cluster_bbox", "cluster_segm"):
        values = [v for v in found[task].values() if not math.isnan(v)]
        assert len(values) >= 7
        assert values == pytest.approx([100] * len(values))
    about = found["clusters"]
    assert about["clusters"] == about["named"] == 4
    assert about["dropped"] == 0
    for key in (
        "covered",
        "covered_r",
        "covered_c",
        "covered_f",
        "matched",
        "purity",
        "NMI",
        "ACC",
    ):
        assert about[key] == pytest.approx(100), key


def test_a_class_is_not_named_by_the_images_it_is_scored_on(register, tmp_path):
    """Category 5 is in the images of fold 1 only, so nothing else can say what its cluster is."""
    there = {i: [1, 2] for i in FOLD[0][:5]} | {i: [1, 2, 5] for i in FOLD[1][:5]}
    content = scenes(there)
    name = of_content(register, tmp_path, content)
    found = run(evaluator_of(name, LOOSE, output_dir=str(tmp_path)), perfect(content))
    # 100 on fold 0; two of three categories on fold 1.
    assert found["cluster_segm"]["AP"] == pytest.approx((100 + 200 / 3) / 2)
    assert found["cluster_segm"]["APc"] == pytest.approx((100 + 50) / 2)
    assert found["clusters"]["named"] == (3 + 2) / 2
    assert found["clusters"]["covered"] == pytest.approx((100 + 200 / 3) / 2)
    assert found["clusters"]["covered_c"] == pytest.approx((100 + 50) / 2)
    assert found["clusters"]["dropped"] == pytest.approx(100 * 5 / 25)
    results = json.loads((tmp_path / "cluster_lvis_results.json").read_text())
    assert Counter(r["category_id"] for r in results) == {1: 10, 2: 10}
    # With the labels of the scored images it has its name.
    found = run(evaluator_of(name, SAME, output_dir=str(tmp_path)), perfect(content))
    assert found["cluster_segm"]["AP"] == pytest.approx(100)
    results = json.loads((tmp_path / "cluster_lvis_results.json").read_text())
    assert Counter(r["category_id"] for r in results) == {1: 10, 2: 10, 5: 5}


def test_labels_of_scored_images_do_not_outvote_others(register, tmp_path):
    """One cluster: category 1 in fold 0, category 2 in fold 1. All is wrong, on both."""
    content = scenes({i: [1] for i in FOLD[0][:5]} | {i: [2] for i in FOLD[1][:9]})
    name = of_content(register, tmp_path, content)
    lumped = {"cluster": lambda tangents: np.zeros(len(tangents), dtype=np.int64)}
    found = run(evaluator_of(name, LOOSE, **lumped, output_dir=str(tmp_path)), perfect(content))
    assert found["cluster_segm"]["AP"] == 0
    assert found["clusters"]["dropped"] == 0
    assert found["clusters"]["covered"] == 0
    results = json.loads((tmp_path / "cluster_lvis_results.json").read_text())
    expected = dict.fromkeys(FOLD[0][:5], 2) | dict.fromkeys(FOLD[1][:9], 1)
    assert {r["image_id"]: r["category_id"] for r in results} == expected


def messy(content, seed):
    """Moved boxes, missed objects, false alarms, clusters that mix; by image id."""
    rng = np.random.default_rng(seed)
    outputs = {}
    for image in content["images"]:
        boxes, clusters = [], []
        for a in content["annotations"]:
            if a["image_id"] == image["id"] and rng.random() < 0.9:
                x, y, w, h = (int(v) for v in a["bbox"])
                boxes.append([x, y, w - int(rng.integers(0, w // 2)), h])
                mixed = rng.random() < 0.25
                clusters.append(int(rng.integers(0, 7)) if mixed else a["category_id"])
        if rng.random() < 0.5:
            boxes.append([60, 80, int(rng.integers(10, 60)), 20])
            clusters.append(int(rng.integers(0, 7)))
        scores = np.round(rng.random(len(boxes)), 1).tolist()
        outputs[image["id"]] = boxes, clusters, scores
    return outputs


def as_pairs(outputs):
    for image_id, (boxes, clusters, scores) in outputs.items():
        found = instances(boxes, scores, pred_tangents=one_hot(clusters))
        yield {"image_id": image_id}, {"instances": found}


def box_iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def matched_category(content, image_id, box):
    there = [a for a in content["annotations"] if a["image_id"] == image_id]
    best = max(there, key=lambda a: box_iou(box, a["bbox"]), default=None)
    return best["category_id"] if best and box_iou(box, best["bbox"]) >= 0.5 else None


@pytest.mark.parametrize("split", ["two_fold", "same"])
@pytest.mark.parametrize("seed", range(3))
def test_against_the_protocol_written_out(register, tmp_path, split, seed):
    content = both_folds(12)
    outputs = messy(content, seed)
    naming = NamingSettings(split=split, min_purity=0.6, min_size=3)
    name = of_content(register, tmp_path, content)
    found = run(evaluator_of(name, naming), as_pairs(outputs))

    matched = [
        (image, cluster, matched_category(content, image, box))
        for image, (boxes, clusters, _) in outputs.items()
        for box, cluster in zip(boxes, clusters)
    ]
    folds = [None] if split == "same" else [0, 1]
    total, dropped, aps = len(matched), 0, []
    for fold in folds:
        names = {}
        for k in range(8):
            votes = Counter(
                category
                for image, cluster, category in matched
                if cluster == k and category and (fold is None or fold_of_image(image) != fold)
            )
            if votes and sum(votes.values()) >= 3:
                top = min(c for c in votes if votes[c] == max(votes.values()))
                if votes[top] / sum(votes.values()) >= 0.6:
                    names[k] = top
        images = {i for i in outputs if fold is None or fold_of_image(i) == fold}
        part = dict(content)
        part["images"] = [i for i in content["images"] if i["id"] in images]
        part["annotations"] = [a for a in content["annotations"] if a["image_id"] in images]
        results = []
        for image in sorted(images):
            for box, k, score in zip(*outputs[image]):
                if k not in names:
                    dropped += 1
                    continue
                mask = annotation(1, image, 1, box)["segmentation"]
                entry = {"image_id": image, "category_id": names[k], "segmentation": mask}
                # Scores pass through float32.
                results.append(entry | {"score": float(np.float32(score))})
        aps.append(lvis_numbers(part, results, "segm", tmp_path))
    for metric, value in found["cluster_segm"].items():
        values = [100 * ap[metric] for ap in aps if ap[metric] > -1]
        expected = np.mean(values) if values else math.nan
        assert value == pytest.approx(expected, nan_ok=True), metric
    assert 0 < found["cluster_segm"]["AP"] < 100
    about = found["clusters"]
    assert about["dropped"] == pytest.approx(100 * dropped / total)
    pairs = [(k, c) for _, k, c in matched if c]
    assert about["matched"] == pytest.approx(100 * len(pairs) / total)
    assert 0 < about["matched"] < 100
    nmi = normalized_mutual_info_score([c for _, c in pairs], [k for k, _ in pairs])
    assert about["NMI"] == pytest.approx(100 * nmi)


def store_of(images, categories, dim=8, shift=0.0):
    """Embedded objects: unit vectors of their categories."""
    return SimpleNamespace(
        tangents=one_hot(categories, dim).numpy() + np.float32(shift),
        classes=np.array(categories) - 1,
        image_ids=np.array(images),
    )


@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
def test_knn_names_by_embedded_objects(register, tmp_path, geometry):
    """Those of the scored fold have no vote, those of other data sets have."""
    content = both_folds()
    name = of_content(register, tmp_path, content)
    objects = [(a["image_id"], a["category_id"]) for a in content["annotations"]]
    settings = {"min_size": 1, "knn": 1}
    store = store_of(*zip(*objects))
    space = {"geometry": geometry, "c": 0.7, "ground_truth": store}
    naming = NamingSettings("knn_val", **settings)
    found = run(evaluator_of(name, naming, **space), perfect(content))
    assert found["cluster_segm"]["AP"] == pytest.approx(100)
    # Objects of category 1 in fold 1 only: on fold 1 its cluster goes by its nearest other one.
    kept = [(i, c) for i, c in objects if c != 1 or fold_of_image(i) == 1]
    space["ground_truth"] = store_of(*zip(*kept))
    found = run(evaluator_of(name, naming, **space), perfect(content))
    on_fold_1 = {c for i, c in objects if fold_of_image(i) == 1}
    assert 1 in on_fold_1
    assert found["clusters"]["covered"] == pytest.approx((100 + 75) / 2)
    same = NamingSettings("knn_val", "same", **settings)
    found = run(evaluator_of(name, same, **space), perfect(content))
    assert found["clusters"]["covered"] == pytest.approx(100)
    # Images that are not evaluated.
    space["ground_truth"] = store_of([i + 1000 for i, _ in objects], [c for _, c in objects])
    found = run(evaluator_of(name, naming, **space), perfect(content))
    assert found["cluster_segm"]["AP"] == pytest.approx(100)


def test_knn_needs_fitting_objects(register, tmp_path):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    naming = NamingSettings("knn_val", min_size=1)
    with pytest.raises(ValueError, match="needs embedded ground truth"):
        evaluator_of(name, naming)
    with pytest.raises(ValueError, match=r"classes \[6\], of which .*toy.json"):
        evaluator_of(name, naming, ground_truth=store_of([1], [7]))
    evaluator = evaluator_of(name, naming, ground_truth=store_of([1], [1], dim=4))
    with pytest.raises(ValueError, match="4 dimensions, pred_tangents have 8"):
        run(evaluator, perfect(content))
    pairs = list(perfect(content, pred_clusters=lambda objects: torch.zeros(len(objects)).long()))
    for _, output in pairs:
        output["instances"].remove("pred_tangents")
    with pytest.raises(ValueError, match="needs pred_tangents"):
        run(evaluator, pairs)


def test_clusters_of_the_model(register, tmp_path):
    """Nothing is clustered then."""

    def refuse(tangents):
        raise AssertionError("clustered again")

    content = both_folds()
    name = of_content(register, tmp_path, content)

    def clusters(objects):
        return torch.tensor([a["category_id"] % 3 for a in objects], dtype=torch.int64)

    pairs = list(perfect(content, pred_clusters=clusters))
    found = run(evaluator_of(name, SAME, refuse), pairs)
    assert found["clusters"]["clusters"] == 3
    assert found["clusters"]["covered"] == 75
    assert 0 < found["cluster_segm"]["AP"] < 100
    # If some images lack them, all are clustered.
    pairs[0][1]["instances"].remove("pred_clusters")
    assert run(evaluator_of(name, SAME), pairs)["clusters"]["clusters"] == 4
    pairs[1][1]["instances"].remove("pred_tangents")
    with pytest.raises(ValueError, match="some images have no pred_tangents, of others no clus"):
        run(evaluator_of(name, SAME), pairs)


def test_classes_of_the_detector_do_not_matter(register, tmp_path):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    pairs = list(perfect(content, pred_classes=lambda objects: -torch.arange(len(objects))))
    assert run(evaluator_of(name), pairs)["cluster_segm"]["AP"] == pytest.approx(100)


def test_order_and_batches_do_not_matter(register, tmp_path):
    content = both_folds(12)
    name = of_content(register, tmp_path, content)
    pairs = list(as_pairs(messy(content, 0)))
    settings = ClusterSettings(k=5, centroid="kmeans")
    naming = NamingSettings(min_purity=0.5)
    numbers, files = [], []
    for way in (pairs, pairs[::-1], pairs + pairs[:2]):
        evaluator = evaluator_of(name, naming, settings, output_dir=str(tmp_path))
        numbers.append(run(evaluator, way))
        files.append((tmp_path / "cluster_lvis_results.json").read_bytes())
    assert files[0] == files[1] == files[2]
    assert len(json.loads(files[0])) > 10
    for other in numbers[1:]:
        for key, values in numbers[0].items():
            assert other[key] == pytest.approx(values, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("naming", [LOOSE, SAME, NamingSettings("hungarian")])
@pytest.mark.parametrize("seen", [0, 5, None])
def test_no_detections(register, tmp_path, caplog, naming, seen):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    evaluator = evaluator_of(name, naming, output_dir=str(tmp_path))
    empty = instances([], pred_tangents=torch.zeros(0, 8))
    images = content["images"][:seen]
    found = run(evaluator, [({"image_id": i["id"]}, {"instances": empty}) for i in images])
    tasks = ["cluster_bbox", "cluster_segm"] if images else ["cluster_bbox"]
    assert list(found) == [*tasks, "clusters"]
    assert found[tasks[-1]]["AP"] == 0
    assert found["clusters"]["named"] == found["clusters"]["covered"] == 0
    assert math.isnan(found["clusters"]["dropped"])
    assert json.loads((tmp_path / "cluster_lvis_results.json").read_text()) == []
    assert ("were not processed" in caplog.text) == (seen is not None)


def test_all_clusters_too_small(register, tmp_path):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    found = run(evaluator_of(name, NamingSettings(min_size=999)), perfect(content))
    assert found["cluster_segm"]["AP"] == 0
    assert found["clusters"]["dropped"] == 100
    assert found["clusters"]["purity"] == 100


def test_a_fold_without_images(register, tmp_path):
    """Its numbers are none, and the mean is that of the other."""
    content = scenes({i: [1, 2] for i in FOLD[0][:4]})
    name = of_content(register, tmp_path, content)
    found = run(evaluator_of(name, LOOSE), perfect(content))
    assert found["cluster_segm"]["AP"] == 0  # there is no other half to learn names from
    assert found["clusters"]["dropped"] == 100
    assert found["clusters"]["covered"] == 0


def test_boxes_alone(register, tmp_path):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    pairs = list(perfect(content))
    for _, output in pairs:
        output["instances"].remove("pred_masks")
    found = run(evaluator_of(name), pairs)
    assert list(found) == ["cluster_bbox", "clusters"]
    assert found["cluster_bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(ValueError, match="none are predicted"):
        run(evaluator_of(name, tasks=["segm"]), pairs)
    found = run(evaluator_of(name, tasks=["segm"]), perfect(content))
    assert list(found) == ["cluster_segm", "clusters"]


def test_masks_are_matched_not_boxes(register, tmp_path):
    """A mask that fills a third of its object's box is matched with nothing."""
    content = scenes({i: [1] for i in FOLD[0][:4]})
    name = of_content(register, tmp_path, content)
    pairs = list(perfect(content))
    for _, output in pairs:
        output["instances"].pred_masks[:, :, 12:] = False
    assert run(evaluator_of(name), pairs)["clusters"]["matched"] == 0
    assert run(evaluator_of(name, tasks=["bbox"]), pairs)["clusters"]["matched"] == 100


def spoilt(change):
    found = instances([BOXES[0]], pred_tangents=one_hot([1]))
    change(found)
    return found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.remove("pred_tangents"), "neither pred_tangents nor pred_clusters"),
        (lambda f: f.pred_tangents.fill_(math.nan), r"pred_tangents must be finite and \(n, D\)"),
        (lambda f: f.set("pred_tangents", torch.ones(1)), r"finite and \(n, D\), got \(1,\)"),
        (lambda f: f.set("pred_clusters", torch.tensor([-1])), "pred_clusters"),
        (lambda f: f.set("pred_clusters", torch.ones(1)), "pred_clusters"),
        (lambda f: f.remove("pred_boxes"), "need pred_boxes"),
        (lambda f: f.scores.fill_(math.nan), "NaN/inf"),
    ],
)
def test_bad_detections(register, tmp_path, change, match):
    content = both_folds()
    evaluator = evaluator_of(of_content(register, tmp_path, content))
    with pytest.raises(ValueError, match=f"image 7: .*{match}"):
        evaluator.process([{"image_id": 7}], [{"instances": spoilt(change)}])


def test_bad_arguments_and_images(register, tmp_path):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    with pytest.raises(ValueError, match="tasks"):
        evaluator_of(name, tasks=["keypoints"])
    with pytest.raises(KeyError, match="not registered"):
        evaluator_of("nowhere")
    evaluator = evaluator_of(name)
    with pytest.raises(ValueError, match="image 7: no 'instances', but \\['sem_seg'\\]"):
        evaluator.process([{"image_id": 7}], [{"sem_seg": None}])
    found = instances([BOXES[0]], pred_tangents=one_hot([1]))
    with pytest.raises(ValueError, match="image 777 is not in .*toy.json"):
        run(evaluator, [({"image_id": 777}, {"instances": found})])


def embedded(record, numbers=None, dim=24) -> dict:
    """The dataset dict's objects, found, as a model gives them; clusters are categories, or
    `numbers`."""
    found = Instances((record["height"], record["width"]))
    objects = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.scores = torch.linspace(1, 0.5, len(objects))
    found.pred_masks = torch.from_numpy(
        np.array([mask_util.decode(a["segmentation"]) for a in objects])
    ).bool()
    numbers = [a["category_id"] for a in objects] if numbers is None else numbers
    found.pred_tangents = one_hot(numbers, dim)
    return {"instances": found}


@pytest.mark.parametrize(
    ("style", "geometry"), [("lvis", "poincare"), ("lvis", "euclidean"), ("parts", "poincare")]
)
def test_synthetic_scenes_by_the_config(tmp_path, style, geometry):
    """From the registry, beside the class-agnostic evaluator, which has other keys."""
    name = f"cluster_lvis_{style}"
    register_synthetic(name, "lvis", seed=9, count=30, style=style)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.EVALUATORS = ("ClusterLVISEvaluator", "ClassAgnosticCOCOEvaluator")
    records = DatasetCatalog.get(name)
    there = {a["category_id"] for record in records for a in record["annotations"]}
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING
    node.GEOMETRY, node.CLUSTERING.K, node.NAMING.SPLIT = geometry, len(there), "same"
    node.NAMING.MIN_SIZE = 1
    evaluator = build_evaluator(cfg, name)
    assert isinstance(evaluator, DatasetEvaluators)
    found = run(evaluator, [(record, embedded(record, dim=36)) for record in records])
    assert found["segm"]["AP"] == pytest.approx(100)
    assert found["cluster_segm"]["AP"] == pytest.approx(100)
    assert found["clusters"]["clusters"] == len(there)
    assert max(there) >= 24 or style == "lvis"
    assert found["clusters"]["NMI"] == pytest.approx(100)
    assert (tmp_path / "inference/cluster_lvis_results.json").is_file()


def test_embedded_objects_by_the_config(register, tmp_path):
    content = both_folds()
    name = of_content(register, tmp_path, content)
    objects = sorted(content["annotations"], key=lambda a: a["image_id"])
    writer = EmbeddingWriter(tmp_path / "store", dim=8, geometry="poincare", c=1.0)
    count = len(objects)
    writer.add(
        EmbeddingRows(
            image_ids=np.array([a["image_id"] for a in objects], dtype=np.int64),
            scores=np.ones(count, dtype=np.float32),
            boxes=np.zeros((count, 4), dtype=np.float32),
            areas=np.ones(count, dtype=np.int64),
            classes=np.array([a["category_id"] - 1 for a in objects], dtype=np.int64),
            tangents=one_hot([a["category_id"] for a in objects]).numpy(),
        )
    )
    writer.finish({})
    cfg = get_cfg()
    cfg.TEST.EVALUATORS = ("ClusterLVISEvaluator",)
    cfg.OUTPUT_DIR = str(tmp_path)
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING
    node.CLUSTERING.K, node.NAMING.METHOD, node.NAMING.MIN_SIZE = 4, "knn_val", 1
    with pytest.raises(ValueError, match="needs GROUND_TRUTH"):
        build_evaluator(cfg, name)
    node.NAMING.GROUND_TRUTH = str(tmp_path / "store")
    found = run(build_evaluator(cfg, name), perfect(content))
    assert found["cluster_segm"]["AP"] == pytest.approx(100)
    node.CURVATURE = 0.5
    with pytest.raises(ValueError, match="is of .*'c': 1.0.*, the model of .*'c': 0.5"):
        build_evaluator(cfg, name)


def test_real_annotations_of_lvis(shared_datasets, tmp_path):
    """Nine images of LVIS v0.5 val, 1230 categories, through Detectron2's loader."""
    name = "lvis_v0.5_val_of_this_test"
    file = shared_datasets / "lvis/lvis_v0.5_val.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    meta = get_lvis_instances_meta(name)
    register_lvis_instances(name, meta, str(file), str(shared_datasets / "coco/"))
    try:
        records = DatasetCatalog.get(name)
        for record in records:
            for a in record["annotations"]:
                size = record["height"], record["width"]
                a["segmentation"] = mask_util.merge(mask_util.frPyObjects(a["segmentation"], *size))
        classes = sorted({a["category_id"] for r in records for a in r["annotations"]})
        pairs = []
        for record in records:
            numbered = [classes.index(a["category_id"]) for a in record["annotations"]]
            pairs.append((record, embedded(record, numbered, len(classes))))
        found = run(evaluator_of(name, SAME, output_dir=str(tmp_path)), pairs)
        assert found["cluster_segm"]["AP"] == pytest.approx(100)
        assert found["clusters"]["clusters"] == found["clusters"]["named"] == len(classes)
        assert found["clusters"]["covered"] == 100
        honest = run(evaluator_of(name, LOOSE), pairs)
        of_fold = [
            {
                a["category_id"]
                for r in records
                for a in r["annotations"]
                if fold_of_image(r["image_id"]) == fold
            }
            for fold in (0, 1)
        ]
        both = len(of_fold[0] & of_fold[1])
        expected = 50 * sum(both / len(there) for there in of_fold)
        assert honest["cluster_segm"]["AP"] == pytest.approx(expected)
        assert honest["clusters"]["covered"] == pytest.approx(expected)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def evaluate_on_rank(rank, folder, name, content):
    """One of two processes; the image in the middle goes to both."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(json_file=f"{folder}/{name}.json")
    pairs = list(as_pairs(messy(content, 0)))
    # Every second image, so that the order of arrival is not that of the ids.
    mine = pairs[rank::2] + pairs[:1]
    settings = ClusterSettings(k=5, centroid="kmeans")
    evaluator = evaluator_of(name, NamingSettings(min_purity=0.5), settings, output_dir=folder)
    results = run(evaluator, mine)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_ranks(register, tmp_path):
    """Two processes give what one gives, to the byte; only the main one has numbers."""
    content = both_folds(12)
    name = of_content(register, tmp_path, content)
    settings = ClusterSettings(k=5, centroid="kmeans")
    evaluator = evaluator_of(
        name, NamingSettings(min_purity=0.5), settings, output_dir=str(tmp_path)
    )
    expected = run(evaluator, as_pairs(messy(content, 0)))
    file = tmp_path / "cluster_lvis_results.json"
    written = file.read_bytes()
    file.unlink()
    arguments = (str(tmp_path), name, content)
    mp.start_processes(evaluate_on_rank, arguments, nprocs=2, start_method="spawn")
    assert file.read_bytes() == written
    assert (tmp_path / "1.json").read_text() == "{}"
    found = json.loads((tmp_path / "0.json").read_text())
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=0, abs=0, nan_ok=True)
