"""Exemplar pools of whole folders and data sets: the right objects, the same bytes always."""

import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
from processes import wait_until
from toy_segmenter import RedThings, arguments, red_image, write_config, write_image

from unseg.checkpoint import CheckpointError
from unseg.config import load_config
from unseg.data.image import ImageReadError
from unseg.discovery import ExemplarError, load_exemplar_pool
from unseg.engine import build_exemplars
from unseg.engine.build_exemplars import _ImageEncoder, mask_warnings
from unseg.engine.dataset_job import ImageLoader, ImageSource
from unseg.engine.exemplar_job import ExemplarMaker, floats_from_text
from unseg.engine.exemplar_plan import plan_folder, plan_medoids, plan_random
from unseg.structures import ImageRecord

BUILD = "MODEL.EXEMPLAR.BUILD."
BOX = (24, 16, 56, 40)

pytestmark = pytest.mark.usefixtures("restored_loggers")


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def log(restored_loggers, caplog):
    """What is logged, also once a command has taken the loggers over."""
    logger = logging.getLogger("unseg")
    logger.addHandler(caplog.handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return caplog


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Folders of 3, 2 and 4 images; the objects of a class have one colour."""
    root = tmp_path_factory.mktemp("classes") / "things"
    colors = {"apple": (220, 40, 30), "brick": (200, 110, 40), "rose": (230, 60, 140)}
    for (name, color), count in zip(colors.items(), (3, 2, 4), strict=True):
        for i in range(count):
            box = (24 - 2 * i, 16, 56 - 2 * i, 40 + i)
            size = (64, 80) if i % 2 else (72, 72)
            write_image(root / name / f"{i}.png", red_image(box, size, color, seed=i))
    return root


def build(config, output, *opts, **changes):
    build_exemplars(arguments(config, output, *opts, **changes))
    return load_exemplar_pool(output)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_objects_mask_and_embedding_are_the_models(config, tmp_path):
    write_image(tmp_path / "in/thing/x.png", red_image(BOX))
    pool = build(config, tmp_path / "out/pool.npz", images=tmp_path / "in")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pool.npz", "pool.png"]
    (exemplar,) = pool.exemplars
    assert (exemplar.category, exemplar.file_name) == ("thing", "thing/x.png")
    assert exemplar.mask_from == "refined"
    x0, y0, x1, y1 = exemplar.box
    # 10 % of its sides around the box
    assert np.abs(np.array([x0, y0, x1, y1]) - (21, 14, 59, 42)).max() <= 1
    height, width = exemplar.mask.shape
    scale = np.array([width / (x1 - x0), height / (y1 - y0)])
    ys, xs = np.nonzero(exemplar.mask)
    found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    true = (np.array(BOX) - (x0, y0, x0, y0)) * np.tile(scale, 2)
    assert np.abs(found - true).max() <= 1.5
    assert 0 <= np.prod(found[2:] - found[:2]) - exemplar.mask.sum() <= 4  # rounded corners
    # Of one colour: that in units of the standard deviation, as a direction.
    color = (np.array([220, 40, 30]) - 100) / 50
    np.testing.assert_allclose(exemplar.embedding, color / np.linalg.norm(color), atol=2e-2)
    assert np.linalg.norm(exemplar.embedding) == pytest.approx(1, abs=1e-6)


def test_the_channels_of_a_bgr_model_are_in_its_order(tmp_path):
    write_image(tmp_path / "in/thing/x.png", red_image(BOX))
    pools = [
        build(
            write_config(tmp_path, input_format=form), tmp_path / f"{form}.npz",
            images=tmp_path / "in",
        ).exemplars[0]
        for form in ("RGB", "BGR")
    ]  # fmt: skip
    assert [x.mask_from for x in pools] == ["refined", "refined"]
    assert np.array_equal(pools[0].mask, pools[1].mask)
    assert np.array_equal(pools[0].image, pools[1].image)  # both RGB
    np.testing.assert_allclose(pools[0].embedding, pools[1].embedding[::-1], atol=1e-6)


@pytest.mark.parametrize("form", ["RGB", "BGR"])
def test_whole_images_are_encoded_in_the_models_order(form, tmp_path):
    """Of one colour: an image's embedding is that colour's direction, as the model sees it."""
    cfg = load_config(str(write_config(tmp_path, input_format=form)))
    write_image(tmp_path / "x.png", red_image((0, 0, 64, 64), (64, 64)))
    source = ImageSource(str(tmp_path), [ImageRecord("x.png", 64, 64, 1)])
    encode = _ImageEncoder(cfg, ExemplarMaker(cfg, RedThings(cfg)))
    result, count = encode(ImageLoader(cfg, source)(0))
    color = (np.array([220, 40, 30])[:: 1 if form == "RGB" else -1] - 100) / 50
    assert count == 1
    np.testing.assert_allclose(
        floats_from_text(result["0"]), color / np.linalg.norm(color), atol=1e-5
    )


def test_crops_are_resized_as_images_are_for_testing(config):
    cfg = load_config(str(config))
    model = RedThings(cfg).eval()
    maker = ExemplarMaker(cfg, model)
    model.seen.clear()
    for size in ((30, 40), (20, 100)):
        masks, _ = maker.segment(red_image((2, 2, 12, 12), size))
        assert masks.shape == (2, *size)
        assert masks.dtype == bool
    # the shorter side 48, unless the longer one would exceed 96
    assert model.seen == [(48, 64), (19, 96)]


def test_the_pool_says_how_it_was_made(classes, config, tmp_path):
    pool = build(config, tmp_path / "pool.npz", images=classes)
    info = pool.info
    assert info["settings"]["MODEL"]["EXEMPLAR"]["BUILD"]["SHORT_SIDE"] == 32
    assert info["settings"]["INPUT"]["MIN_SIZE_TEST"] == 48
    assert info["source"]["kind"] == "folder"
    assert info["source"]["name"] == "things"
    assert str(classes.parent) not in str(info)
    assert info["weights"] == ""
    assert info["embedding"]["feature"] == "cells"
    assert info["embedding"]["channels"] == 3
    assert info["statistics"] == {"refined": 3, "coarse": 0, "whole": 0, "skipped": 0}


def test_a_class_gives_its_first_images_in_the_order_of_names(classes, config, tmp_path, log):
    pools = {
        n: build(config, tmp_path / f"{n}.npz", BUILD + "PER_CATEGORY", n, images=classes)
        for n in (1, 3)
    }
    names = [[exemplar.file_name for exemplar in pool.exemplars] for pool in pools.values()]
    assert names[0] == ["apple/0.png", "brick/0.png", "rose/0.png"]
    assert names[1] == ["apple/0.png", "apple/1.png", "apple/2.png", "brick/0.png", "brick/1.png",
                        "rose/0.png", "rose/1.png", "rose/2.png"]  # fmt: skip
    first = pools[3].first_of_each(1).exemplars
    for a, b in zip(pools[1].exemplars, first, strict=True):
        assert (a.file_name, a.box) == (b.file_name, b.box)
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.mask, b.mask)
    assert "fewer exemplars than wanted of 1 categories: brick (2)" in log.text


SOURCES = {
    "folder": ["PER_CATEGORY", 3],
    "random": ["SOURCE", "random", "NUM_CATEGORIES", 5],
    "kmeans": ["SOURCE", "kmeans", "NUM_CATEGORIES", 3, "PER_CATEGORY", 2],
}


def options(source):
    words = SOURCES[source]
    return [x for k, v in zip(words[::2], words[1::2], strict=True) for x in (BUILD + k, v)]


@pytest.mark.parametrize("source", SOURCES)
def test_shards_and_workers_give_the_same_bytes(source, classes, config, tmp_path):
    build(config, tmp_path / "one/pool.npz", *options(source), images=classes)
    workers = [*options(source), "DATALOADER.NUM_WORKERS", 2]
    build(config, tmp_path / "workers/pool.npz", *workers, images=classes)
    for shard in (1, 2, 0):
        output = tmp_path / "shards/pool.npz"
        assert not output.exists()
        build_exemplars(
            arguments(config, output, *options(source), images=classes, num_shards=3, shard=shard)
        )
    wanted = contents(tmp_path / "one")
    assert sorted(wanted) == ["pool.npz", "pool.png"]
    assert contents(tmp_path / "shards") == wanted
    assert contents(tmp_path / "workers") == wanted


def _slow_run(args, seconds):
    import time

    fast = RedThings.find

    def find(self, x):
        time.sleep(seconds)
        return fast(self, x)

    RedThings.find = find
    build_exemplars(args)


@pytest.mark.parametrize("source", ["folder", "kmeans"])
def test_killed_and_resumed_gives_the_same_bytes(source, classes, config, tmp_path):
    build(config, tmp_path / "whole/pool.npz", *options(source), images=classes)
    output = tmp_path / "killed/pool.npz"
    args = arguments(config, output, *options(source), images=classes, resume=True)
    places = [output.parent / "pool.npz.parts"]
    if source == "kmeans":  # once in each pass
        places.insert(0, output.parent / "pool.npz.features.parts")
    for place in places:
        # Not forked: torch's and OpenCV's threads do not survive a fork, and their next call hangs.
        process = multiprocessing.get_context("spawn").Process(
            target=_slow_run, args=(args, 0.5), daemon=True
        )
        process.start()
        wait_until(lambda place=place, p=process: _lines(place) or not p.is_alive())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not output.exists()
    for shard in places[-1].glob("shard-*"):  # killed in the middle of a line
        shard.write_bytes(shard.read_bytes() + b'{"unit":1,"result":{"exempl')
    build_exemplars(args)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _lines(parts):
    return sum(p.read_bytes().count(b"\n") for p in parts.glob("shard-*")) if parts.exists() else 0


def test_what_is_written_is_not_built_again(classes, config, tmp_path, log):
    output = tmp_path / "out/pool.npz"
    build(config, output, images=classes)
    before = output.stat().st_mtime_ns
    # How the pool is trained with later does not matter.
    build(config, output, "MODEL.EXEMPLAR.WEIGHT", 0.5, images=classes, resume=True)
    assert "is complete" in log.text
    assert output.stat().st_mtime_ns == before
    build(config, output, BUILD + "CROP_PAD", 0.3, images=classes, resume=True)
    assert output.stat().st_mtime_ns > before


def test_other_settings_cannot_resume(classes, config, tmp_path):
    output = tmp_path / "out/pool.npz"
    build_exemplars(arguments(config, output, images=classes, num_shards=2))
    with pytest.raises(ExemplarError, match=r"different: .*CROP_PAD"):
        build(config, output, BUILD + "CROP_PAD", 0.3, images=classes, resume=True)
    build(config, output, BUILD + "CROP_PAD", 0.3, images=classes)  # starts over
    assert sorted(contents(output.parent)) == ["pool.npz", "pool.png"]


def test_unreadable_images_raise_or_the_next_ones_take_their_places(config, tmp_path, log):
    root = tmp_path / "in"
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/1.png"):
        write_image(root / name, red_image(BOX))
    (root / "a/1.png").write_bytes((root / "a/0.png").read_bytes()[:300])
    (root / "b/0.png").write_bytes(b"")
    two = [BUILD + "PER_CATEGORY", 2]
    output = tmp_path / "out/pool.npz"
    with pytest.raises(ImageReadError, match=r"a/1\.png: cannot be read"):
        build(config, output, *two, images=root)
    assert not output.exists()
    assert not output.with_suffix(".png").exists()
    pool = build(config, output, *two, "INPUT.ON_BAD_IMAGE", "skip", images=root)
    assert [x.file_name for x in pool.exemplars] == ["a/0.png", "a/2.png", "b/1.png"]
    assert pool.info["statistics"]["skipped"] == 2
    assert "b (1)" in log.text
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    for source in ("folder", "random", "kmeans"):
        before = contents(output.parent)
        with pytest.raises(ExemplarError, match=r"none of the \d images can be read"):
            build(config, output, BUILD + "SOURCE", source, "INPUT.ON_BAD_IMAGE", "skip",
                  images=root)  # fmt: skip
        assert contents(output.parent) == before


def test_bad_images_found_late_are_replaced_in_random_choices(classes, config, tmp_path):
    root = tmp_path / "in"
    for i in range(6):
        write_image(root / f"{i}.png", red_image(BOX, seed=i))
    opts = [BUILD + "SOURCE", "random", BUILD + "NUM_CATEGORIES", 4]
    names = [x.file_name for x in build(config, tmp_path / "all.npz", *opts, images=root).exemplars]
    assert len(set(names)) == 4
    whole = (root / names[1]).read_bytes()
    (root / names[1]).write_bytes(whole[: len(whole) // 2])  # its header is fine
    opts += ["INPUT.ON_BAD_IMAGE", "skip"]
    pool = build(config, tmp_path / "some.npz", *opts, images=root)
    found = {x.file_name for x in pool.exemplars}
    assert len(found) == len(pool) == 4
    assert found > set(names) - {names[1]}
    assert {x.category for x in pool.exemplars} == {"random"}


def test_clusters_are_those_of_the_features(config, tmp_path):
    """Whole images of three colours, 4, 3 and 2 of them: nothing else tells them apart."""
    colors = {"blue": (30, 40, 200), "green": (30, 200, 50), "red": (200, 30, 40)}
    for (name, color), count in zip(colors.items(), (4, 3, 2), strict=True):
        for i in range(count):
            write_image(tmp_path / f"in/{name}{i}.png", red_image((0, 0, 80, 64), color=color))
    opts = [BUILD + "SOURCE", "kmeans", BUILD + "NUM_CATEGORIES", 3, BUILD + "PER_CATEGORY", 2]
    pool = build(config, tmp_path / "out/pool.npz", *opts, images=tmp_path / "in")
    found = [(x.category[-3:], x.file_name[:-5]) for x in pool.exemplars]
    wanted = [("000", "blue"), ("001", "green"), ("002", "red")]
    assert found == [pair for pair in wanted for _ in range(2)]
    assert pool.exemplars[0].category == "cluster 000"
    # One colour each: GrabCut cannot split them, only the red ones are objects to the model.
    assert pool.info["statistics"] == {"refined": 2, "coarse": 0, "whole": 4, "skipped": 0}


def test_data_sets_that_are_registered(classes, config, tmp_path, register):
    files = [classes / "apple/1.png", classes / "rose/1.png"]  # 64 x 80
    dicts = [
        {"file_name": str(file), "height": 64, "width": 80, "image_id": i}
        for i, file in enumerate(files)
    ]
    name = register(dicts, image_root=str(classes))
    opts = [BUILD + "SOURCE", "random", BUILD + "NUM_CATEGORIES", 2]
    pool = build(config, tmp_path / "pool.npz", *opts, dataset=name)
    assert [x.file_name for x in pool.exemplars] == ["apple/1.png", "rose/1.png"]
    assert pool.info["source"]["name"] == name


def test_fewer_images_than_wanted(classes, config, tmp_path, log):
    opts = [BUILD + "SOURCE", "random", BUILD + "NUM_CATEGORIES", 10]
    assert len(build(config, tmp_path / "pool.npz", *opts, images=classes)) == 9
    assert "10 exemplars are wanted, of 9 images" in log.text


@pytest.mark.parametrize(
    ("opts", "kind", "message"),
    [
        ([BUILD + "SOURCE", "web"], ExemplarError, r"'web' is unknown.* folder, random, kmeans"),
        ([BUILD + "PER_CATEGORY", 0], ExemplarError, "PER_CATEGORY must be 1 or more, got 0"),
        ([BUILD + "SEED", -1], ExemplarError, "SEED must be in 0.*, got -1"),
        ([BUILD + "CROP_PAD", -0.5], ExemplarError, "CROP_PAD must be"),
        (["MODEL.EXEMPLAR.IN_FEATURE", "res5"], ExemplarError, r"'res5' .*cells"),
        (["MODEL.META_ARCHITECTURE", "BoxesOnly"], ExemplarError, r"BoxesOnly\) gives no instan"),
        (["MODEL.WEIGHTS", "none.pth"], FileNotFoundError, r"none\.pth does not exist"),
        ([BUILD + "CROP_PAD"], ExemplarError, r"RedThings_RGB\.yaml: .*pairs"),
        (["MODEL.NO_SUCH_KEY", 1], ExemplarError, "NO_SUCH_KEY"),
        (["INPUT.ON_BAD_IMAGE", "ignore"], ExemplarError, "raise or skip"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(
    opts, kind, message, classes, config, tmp_path
):
    (tmp_path / "out").mkdir()
    with pytest.raises(kind, match=message):
        build(config, tmp_path / "out/pool.npz", *opts, images=classes)
    assert contents(tmp_path / "out") == {}


def test_bad_places_are_named(classes, config, tmp_path):
    (tmp_path / "dir.npz").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for output, images, message in (
        ("dir.npz", classes, r"dir\.npz is a folder"),
        ("pool.png", classes, r"must end in \.npz"),
        ("x.npz", tmp_path / "empty", "no class folders"),
        ("x.npz", tmp_path / "none", "no such folder"),
        ("x.npz", classes / "apple", "images must lie in class folders; 3 do not"),
    ):
        with pytest.raises(ExemplarError, match=message):
            build(config, tmp_path / output, images=images)
    with pytest.raises(ExemplarError, match="SOURCE folder needs --images"):
        build(config, tmp_path / "x.npz", dataset="unseg_synthetic_val")
    with pytest.raises(ExemplarError, match="no_such_data_set"):
        build(config, tmp_path / "x.npz", BUILD + "SOURCE", "random", dataset="no_such_data_set")
    with pytest.raises(OSError, match="file"):
        build(config, tmp_path / "file/x.npz", images=classes)
    assert sorted(contents_of_files(tmp_path)) == ["RedThings_RGB.yaml", "file"]


def contents_of_files(folder):
    return [p.name for p in folder.rglob("*") if p.is_file()]


def test_weights_must_be_there_for_models_that_have_some(classes, tmp_path):
    tiny = "projects/FreeSOLO/configs/freesolo_tiny.yaml"
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        build(tiny, tmp_path / "x.npz", "MODEL.DEVICE", "cpu", images=classes)


def test_units_are_whole_classes_of_about_a_batch():
    files = {"a": ["a/0", "a/1"], "b": ["b/0"], "c": ["c/0"]}
    for per_category, batch, sizes in ((1, 2, [2, 1]), (2, 4, [2, 1]), (9, 4, [1, 1, 1])):
        plan = plan_folder("root", files, per_category, batch)
        assert [len(unit) for unit in plan.units] == sizes
        assert plan.wanted() == dict.fromkeys("abc", per_category)
    assert plan.units[0][0].file_names == ("a/0", "a/1")
    clusters = plan_medoids("root", "uvwxyz", [(0, 5), (0, 2), (2, 1)], 2, batch_size=2)
    assert [unit[0].file_names for unit in clusters.units] == [("z", "w"), ("v",)]
    assert [unit[0].category for unit in clusters.units] == ["cluster 000", "cluster 002"]


def test_random_units_share_no_image_and_more_are_added_to_fewer():
    names = [f"{i}.jpg" for i in range(40)]

    def units(count):
        plan = plan_random("root", names, count, batch_size=4, seed=3)
        return [unit[0] for unit in plan.units]

    ten = units(10)
    assert [unit.count for unit in ten] == [4, 4, 2]
    everything = [name for unit in ten for name in unit.file_names]
    assert len(everything) == len(set(everything)) == 20  # as many spares
    chosen = {name for unit in ten for name in unit.file_names[: unit.count]}
    more = {name for unit in units(15) for name in unit.file_names[: unit.count]}
    assert len(chosen) == 10
    assert chosen < more
    assert plan_random("root", names, 10, batch_size=4, seed=4).units != tuple((u,) for u in ten)


def test_what_is_wrong_with_most_masks_is_said():
    def counts(refined, coarse, whole):
        return {"refined": refined, "coarse": coarse, "whole": whole, "skipped": 99}

    assert mask_warnings(counts(2, 1, 1)) == []
    assert mask_warnings(counts(2, 2, 0)) == []
    (warning,) = mask_warnings(counts(1, 2, 0))
    assert warning.startswith("2 of 3 masks are GrabCut's")
    (warning,) = mask_warnings(counts(0, 1, 2))
    assert warning.startswith("2 of 3 exemplars are whole images")
