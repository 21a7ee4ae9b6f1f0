"""Embeddings of a data set as a store: complete, the same for any number of processes."""

import copy

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode
from PIL import Image
from pycocotools import mask as mask_util
from quick_rcnn import CONFIG, QUICK
from toy_embedder import DIM, YAML, ToyEmbedder, found_in
from toy_proposer import EMPTY, IDS, objects_of, rectangle, size_of, write_dataset

from unseg.config import load_config
from unseg.data import build_mapper, open_embeddings
from unseg.data.image import read_image
from unseg.engine import EmbeddingJob, images_of_dataset
from unseg.engine.embedded_objects import annotated_objects, found_objects
from unseg.structures import encode_masks

SHARDS = [f"shard-{n:05d}.npz" for n in range(3)]
ALL_FILES = {*SHARDS, "manifest.json"}
IN_ORDER = sorted(IDS)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Seven images make three shards."""
    monkeypatch.setattr(EmbeddingJob, "block", 3)


@pytest.fixture
def dicts(tmp_path):
    (tmp_path / "images").mkdir()
    return write_dataset(tmp_path / "images")


@pytest.fixture
def dataset(dicts, register):
    return register(lambda: copy.deepcopy(dicts), thing_classes=["thing"])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "toy.yaml").write_text(YAML)
    cfg = load_config(str(tmp_path / "toy.yaml"), [])
    cfg.defrost()
    return cfg


def make_job(config, dataset, output, **options):
    return EmbeddingJob(config, images_of_dataset(dataset), output, **options)


def run(config, dataset, output, model=None, shards=1, **options):
    model = model or ToyEmbedder()
    job = make_job(config, dataset, output, **options)
    job.start(resume=False)
    units = job.work_dir.missing()
    for shard in range(shards):
        job.run(model, units[shard::shards], name=str(shard))
    return job.collect_if_complete()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_object_with_its_own_embedding(config, dataset, tmp_path):
    counts = run(config, dataset, tmp_path / "x", origin={"dataset": dataset})
    assert {*bytes_of(tmp_path / "x")} == ALL_FILES
    assert not (tmp_path / "x.parts").exists()
    store = open_embeddings(tmp_path / "x")
    truth = [(image_id, *found_in(image_id)) for image_id in IN_ORDER]
    numbers = [len(boxes) for _, boxes, _, _ in truth]
    # In the order of ids, and of an image in the model's; to the last bit.
    assert store.image_ids.tolist() == np.repeat(IN_ORDER, numbers).tolist()
    for name, column in (("boxes", 1), ("scores", 2), ("tangents", 3)):
        expected = np.concatenate([x[column] for x in truth]).astype(np.float32)
        assert getattr(store, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(store, name), expected)
    assert set(store.classes.tolist()) == {-1}
    masks = [rle for rows in store.shards() for rle in rows.masks]
    pairs = [(box, image_id) for image_id, boxes, _, _ in truth for box in boxes]
    for rle, area, (box, image_id) in zip(masks, store.areas, pairs, strict=True):
        dense = rectangle(box, size_of(image_id))
        np.testing.assert_array_equal(mask_util.decode(rle), dense)
        assert area == dense.sum()
    assert [len(set(rows.image_ids)) for rows in store.shards()] == [3, 2, 1]  # 13 is empty
    assert (store.dim, store.geometry, store.c) == (DIM, "poincare", 0.5)
    assert (counts.images, counts.objects, counts.images_without_objects) == (7, sum(numbers), 1)
    assert (counts.unreadable_images, counts.left_out_annotations) == (0, 0)
    assert store.info["dataset"] == dataset
    assert store.info["model"] == "ToyEmbedder"
    assert store.info["unseg"]["settings"]["DISCOVERY"]["BATCH_SIZE"] == 2


def test_any_number_of_shards_gives_the_same_bytes(config, dataset, tmp_path):
    for shards in (1, 2, 5):
        run(config, dataset, tmp_path / str(shards), shards=shards)
    files = [bytes_of(tmp_path / str(shards)) for shards in (1, 2, 5)]
    assert files[0].keys() == ALL_FILES
    assert files[0] == files[1] == files[2]


class Dying(ToyEmbedder):
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
    model = ToyEmbedder()
    again.run(model)
    # Batches end where a shard does: 2 + 1 images, 2 + 1 and 1, of which two batches are done.
    assert sorted(len(batch) for batch in model.batches) == [1, 1, 2]
    again.collect_if_complete()
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")


def test_killed_while_writing_the_store(config, dataset, tmp_path, monkeypatch):
    run(config, dataset, tmp_path / "x")
    whole = bytes_of(tmp_path / "x")
    (tmp_path / "x/shard-00007.npz").write_bytes(b"of a larger data set")
    job = make_job(config, dataset, tmp_path / "x")
    job.start(resume=False)
    job.run(ToyEmbedder())
    assert job.is_written()
    with monkeypatch.context() as patch:
        patch.setattr("unseg.data.embeddings.EmbeddingWriter.finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.collect_if_complete()
    assert not job.is_written()
    again = make_job(config, dataset, tmp_path / "x")
    again.start(resume=True)
    again.collect_if_complete()
    assert again.is_written()
    assert bytes_of(tmp_path / "x") == whole


def test_written_stores_are_recognised_by_what_they_depend_on(config, dataset, dicts, tmp_path):
    assert not make_job(config, dataset, tmp_path / "x").is_written()
    run(config, dataset, tmp_path / "x")
    assert make_job(config, dataset, tmp_path / "x").is_written()
    # What is done with a store does not matter, nor clusters: they are not used.
    node = config.MODEL.HIERARCHICAL_EMBEDDING
    node.CLUSTERING.K, node.NAMING.KNN, node.CLUSTERS = 3, 7, "not/there/yet.npz"
    assert make_job(config, dataset, tmp_path / "x").is_written()
    assert not make_job(config, dataset, tmp_path / "x", ground_truth=dataset).is_written()
    config.INPUT.MIN_SIZE_TEST = 40
    assert not make_job(config, dataset, tmp_path / "x").is_written()
    config.INPUT.MIN_SIZE_TEST = 32
    # Annotations matter where they are embedded.
    before = make_job(config, dataset, tmp_path / "x", ground_truth=dataset).info
    dicts[0]["annotations"][0]["category_id"] = 5
    after = make_job(config, dataset, tmp_path / "x", ground_truth=dataset).info
    assert before["annotations"] != after["annotations"]
    (tmp_path / "x/shard-00001.npz").unlink()
    assert not make_job(config, dataset, tmp_path / "x").is_written()


@pytest.mark.parametrize("form", ["bits", "packed", "rle", "windows"])
def test_masks_of_every_form_are_the_same(config, dataset, tmp_path, form):
    run(config, dataset, tmp_path / "bool")
    run(config, dataset, tmp_path / form, ToyEmbedder(form))
    assert bytes_of(tmp_path / form) == bytes_of(tmp_path / "bool")


def test_a_model_of_boxes_alone(config, dataset, tmp_path):
    run(config, dataset, tmp_path / "x", ToyEmbedder("none"))
    store = open_embeddings(tmp_path / "x")
    assert not store.has_masks
    sides = store.boxes[:, 2:] - store.boxes[:, :2]
    assert store.areas.tolist() == (sides[:, 0] * sides[:, 1]).astype(int).tolist()


class Broken(ToyEmbedder):
    """`change` is applied to what is found in image 9."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def find(self, x):
        found = super().find(x)
        if x["image_id"] == 9:
            self.change(found)
        return found


def set_tangents(make):
    return lambda found: found.set("pred_tangents", make(found.pred_tangents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.remove("pred_tangents"), r"5\.png: the instances have no pred_tangents, but "
         r".*MODEL\.ROI_HEADS\.NAME must be one of"),
        (lambda x: x.remove("scores"), r"5\.png: the instances have no scores"),
        (lambda x: x.remove("pred_boxes"), r"5\.png: the instances have no pred_boxes"),
        (set_tangents(lambda u: u * torch.nan), r"5\.png: pred_tangents are NaN/inf"),
        (set_tangents(lambda u: u[:, 0]), r"5\.png: pred_tangents must have 2 axes"),
        (lambda x: x.remove("pred_masks"), "some objects have masks, others have none"),
        (set_tangents(lambda u: u[:, :3]), "have . dimensions, others ."),
    ],
)  # fmt: skip
def test_outputs_that_cannot_be_written(config, dataset, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(config, dataset, tmp_path / "x", Broken(change))
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_outputs_without_instances_or_of_another_size(config, dataset, tmp_path):
    with pytest.raises(ValueError, match="no 'instances'"):
        found_objects({"sem_seg": None}, (4, 5))
    x = {"image_id": 9, "height": 48, "width": 64}
    with pytest.raises(ValueError, match=r"of an image of \(48, 64\), it is \(50, 70\)"):
        found_objects({"instances": ToyEmbedder().find(x)}, (50, 70))

    class OneLess(ToyEmbedder):
        def forward(self, inputs):
            return super().forward(inputs)[1:]

    with pytest.raises(ValueError, match=r"1 outputs for 2 images: .*\.png, .*\.png"):
        run(config, dataset, tmp_path / "x", OneLess())


def test_images_that_cannot_be_read(config, dataset, tmp_path):
    (tmp_path / "images/1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"1\.png"):
        run(config, dataset, tmp_path / "x")
    config.INPUT.ON_BAD_IMAGE = "skip"
    counts = run(config, dataset, tmp_path / "x")
    assert (counts.images, counts.images_without_objects, counts.unreadable_images) == (7, 2, 1)
    assert set(open_embeddings(tmp_path / "x").image_ids) == {*IDS} - {EMPTY, IDS[1]}


def test_nothing_can_be_read(config, dicts, register, tmp_path):
    (tmp_path / "images/0.png").write_bytes(b"no image")
    config.INPUT.ON_BAD_IMAGE = "skip"
    counts = run(config, register(dicts[:1]), tmp_path / "x")
    assert (counts.objects, counts.unreadable_images) == (0, 1)
    assert open_embeddings(tmp_path / "x").tangents.shape == (0, 7)  # as the config says


def test_ids_as_text(config, dicts, register, tmp_path):
    texts = register([d | {"image_id": str(d["image_id"])} for d in dicts])
    run(config, texts, tmp_path / "x")
    store = open_embeddings(tmp_path / "x")
    assert list(dict.fromkeys(store.image_ids)) == sorted(map(str, {*IDS} - {EMPTY}))
    for image_id in (9, 30):
        own = store.tangents[store.image_ids == str(image_id)]
        np.testing.assert_array_equal(own, found_in(image_id)[2])


def test_ids_must_be_unique(config, dicts, register):
    with pytest.raises(ValueError, match="image ids are not unique"):
        make_job(config, register([*dicts, dicts[0]], "twice"), "x")


# Annotations.


def rcnn_config(**changes):
    settings = QUICK | {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NAME": "HierarchicalEmbeddingROIHeads",
        "MODEL.HIERARCHICAL_EMBEDDING.EMBED_DIM": 6,
        "MODEL.HIERARCHICAL_EMBEDDING.CONV_DIM": 8,
        "MODEL.HIERARCHICAL_EMBEDDING.FC_DIM": 8,
        "MODEL.HIERARCHICAL_EMBEDDING.INIT_STD": 0.5,
        "INPUT.MIN_SIZE_TEST": 96,
        "INPUT.MAX_SIZE_TEST": 200,
        "INPUT.ON_BAD_IMAGE": "skip",
        "DATALOADER.NUM_WORKERS": 0,
        "DISCOVERY.BATCH_SIZE": 1,
    }
    opts = [x for item in (settings | changes).items() for x in item]
    return load_config(str(CONFIG), opts)


@pytest.fixture
def rcnn():
    torch.manual_seed(0)
    return build_model(rcnn_config()).eval()


def expected_tangents(model, record):
    """By hand: boxes in pixels of the resized image, masks in those of the file."""
    image = read_image(record["file_name"], "RGB")
    height, width = image.shape[:2]
    scale = 96 / min(height, width)
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.BILINEAR))
    tensor = torch.from_numpy(resized.transpose(2, 0, 1).copy())
    boxes = torch.from_numpy(objects_of(record["image_id"])).float()
    masks = [rectangle(box, (height, width)) for box in objects_of(record["image_id"])]
    boxes = boxes * torch.tensor([size[1] / width, size[0] / height] * 2)
    with torch.no_grad():
        images = model.preprocess_image([{"image": tensor}])
        features = model.backbone(images.tensor)
        return model.roi_heads.embed(images, features, [Boxes(boxes)], [torch.stack(masks)])[0]


def test_the_annotations_of_a_data_set(dicts, register, rcnn, tmp_path):
    for record in dicts:
        for number, annotation in enumerate(record["annotations"]):
            annotation["category_id"] = number % 3
        assert record["annotations"] or record["image_id"] == 16
    # What has no pixels, and a crowd.
    blank = encode_masks(torch.zeros((1, *size_of(IDS[0])), dtype=torch.bool))[0]
    some = dicts[0]["annotations"][0]
    dicts[0]["annotations"][1:1] = [some | {"segmentation": blank}, some | {"iscrowd": 1}]
    (tmp_path / "images/3.png").write_bytes(b"no image")
    name = register(dicts)
    counts = run(rcnn_config(), name, tmp_path / "x", rcnn, shards=2, ground_truth=name)
    store = open_embeddings(tmp_path / "x")
    assert store.info["unseg"]["annotations"]
    assert (counts.left_out_annotations, counts.unreadable_images) == (2, 1)
    assert counts.images_without_objects == 2
    start = 0
    for image_id in sorted({*IDS} - {EMPTY}):
        boxes = objects_of(image_id)
        rows = slice(start, start := start + len(boxes))
        assert store.image_ids[rows].tolist() == [image_id] * len(boxes)
        np.testing.assert_array_equal(store.boxes[rows], boxes)
        assert store.classes[rows].tolist() == [n % 3 for n in range(len(boxes))]
        assert store.scores[rows].tolist() == [1] * len(boxes)
        if len(boxes):
            record = next(d for d in dicts if d["image_id"] == image_id)
            truth = expected_tangents(rcnn, record).numpy()
            np.testing.assert_allclose(store.tangents[rows], truth, rtol=1e-4, atol=1e-5)
            assert np.abs(truth).max() > 1e-2
    assert start == len(store)
    assert counts.objects == start


def test_a_model_that_looks_at_whole_boxes(dicts, register, rcnn, tmp_path):
    """The toys' annotated masks are their boxes: the same; with others it does not matter."""
    name = register(dicts)
    run(rcnn_config(), name, tmp_path / "masks", rcnn, ground_truth=name)
    expected = open_embeddings(tmp_path / "masks").tangents
    for record in dicts:
        for annotation in record["annotations"]:
            x0, y0, _, _ = map(int, annotation["bbox"])
            dot = rectangle((x0, y0, x0 + 1, y0 + 1), (record["height"], record["width"]))
            annotation["segmentation"] = encode_masks(dot[None])[0]
    rcnn.roi_heads.mask_source = "box"
    run(rcnn_config(), name, tmp_path / "boxes", rcnn, ground_truth=name)
    np.testing.assert_array_equal(open_embeddings(tmp_path / "boxes").tangents, expected)


def test_a_model_that_embeds_nothing(config, dataset, tmp_path):
    with pytest.raises(
        ValueError, match=r"ToyEmbedder embeds no given masks: MODEL\.ROI_HEADS\.NAME"
    ):
        run(config, dataset, tmp_path / "x", ground_truth=dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": None}, r"annotations\[1\] has no segmentation"),
        ({"segmentation": [[1.0, 2, 3]]}, r"annotations\[1\]: .*three points"),
        (
            {"segmentation": {"size": [9, 9], "counts": b"x"}},
            r"annotations\[1\]: segmentation\.size",
        ),
        ({"bbox": [0, 0, np.nan, 4]}, r"annotations\[1\]: bbox is NaN/inf"),
    ],
)
def test_malformed_annotations(change, message):
    good = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2,
            "segmentation": [np.array([1.0, 2, 4, 2, 4, 6, 1, 6])]}  # fmt: skip
    objects, left_out = annotated_objects([good, good], (10, 12))
    assert (len(objects), left_out) == (2, 0)
    assert objects.boxes.tolist() == [[1, 2, 4, 6]] * 2
    assert mask_util.area(objects.masks[0]) == 12
    with pytest.raises(ValueError, match=message):
        annotated_objects([good, good | change], (10, 12))


def test_an_rcnn_finds_and_embeds(dataset, rcnn, tmp_path):
    run(rcnn_config(), dataset, tmp_path / "x", rcnn)
    store = open_embeddings(tmp_path / "x")
    assert (store.dim, store.info["model"]) == (6, "GeneralizedRCNN")
    record = {"file_name": str(tmp_path / "images/5.png"), "height": 48, "width": 64}
    with torch.no_grad():
        (output,) = rcnn([build_mapper(rcnn_config(), False)(record | {"image_id": 9})])
    found = output["instances"]
    assert len(found) > 0
    own = store.image_ids == 9
    np.testing.assert_array_equal(store.tangents[own], found.pred_tangents.numpy())
    np.testing.assert_array_equal(store.boxes[own], found.pred_boxes.tensor.numpy())
    np.testing.assert_array_equal(store.areas[own], found.pred_masks.sum((1, 2)).numpy())
