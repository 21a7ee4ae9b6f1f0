"""Training order: reproducible, resumable at any iteration, the same for any number of workers."""

import gc
import itertools
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from unseg.config import get_cfg
from unseg.data import build_train_loader
from unseg.data.build import skips_bad_images
from unseg.data.image import ImageReadError
from unseg.data.sampling import (
    DrawDataset,
    ResumableLoader,
    TrainingBatchSampler,
    isolated_rng,
    seed_rng,
)


def take(iterable, n):
    return list(itertools.islice(iter(iterable), n))


def test_every_epoch_is_a_permutation():
    sampler = TrainingBatchSampler(13, 1, seed=3)
    indices = [batch[0][0] for batch in take(sampler, 39)]
    for epoch in range(3):
        assert sorted(indices[13 * epoch : 13 * (epoch + 1)]) == list(range(13))
    assert indices[:13] != indices[13:26]
    assert [batch[0][1] for batch in take(sampler, 39)] == list(range(39))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_resuming_continues_the_stream(grouped, repeated):
    rng = np.random.default_rng(0)
    options = {
        "seed": 5,
        "is_wide": rng.random(31) < 0.4 if grouped else None,
        "repeat_factors": 1 + 2 * rng.random(31) if repeated else None,
    }
    whole = take(TrainingBatchSampler(31, 4, **options), 40)
    for start in (0, 1, 7, 23):
        resumed = take(TrainingBatchSampler(31, 4, start_batch=start, **options), 40 - start)
        assert resumed == whole[start:]


def test_ranks_share_one_stream():
    whole = take(TrainingBatchSampler(17, 1, seed=1), 60)
    parts = [take(TrainingBatchSampler(17, 1, seed=1, rank=r, world_size=3), 20) for r in range(3)]
    interleaved = [parts[i % 3][i // 3] for i in range(60)]
    assert interleaved == whole


def test_grouped_batches_have_one_orientation():
    is_wide = np.arange(20) % 3 == 0
    for batch in take(TrainingBatchSampler(20, 4, seed=0, is_wide=is_wide), 50):
        assert len({bool(is_wide[index]) for index, _ in batch}) == 1


def test_repeat_factors_are_met_on_average():
    factors = np.array([1.0, 1.5, 3.25])
    batches = take(TrainingBatchSampler(3, 1, seed=0, repeat_factors=factors), 23000)
    counts = Counter(batch[0][0] for batch in batches)
    shares = np.array([counts[i] for i in range(3)]) / 23000
    np.testing.assert_allclose(shares, factors / factors.sum(), atol=0.01)


def random_mapper(record):
    return {
        "id": record["id"],
        "draws": (random.random(), float(np.random.rand()), float(torch.rand(()))),
    }


def loader(num_workers=0, seed=9, mapper=random_mapper, **options):
    dataset = DrawDataset([{"id": i} for i in range(11)], mapper, **options)
    return ResumableLoader(
        dataset,
        lambda seed, start: TrainingBatchSampler(11, 3, seed=seed, start_batch=start),
        seed=seed,
        num_workers=num_workers,
    )


def test_workers_and_resuming_do_not_change_what_is_drawn():
    whole = take(loader(), 12)
    assert take(loader(num_workers=2), 12) == whole
    resumed = loader(num_workers=1)
    resumed.start_iteration = 5
    assert take(resumed, 7) == whole[5:]
    assert take(loader(seed=10), 12) != whole
    draws = [sample["draws"] for batch in whole for sample in batch]
    assert len(set(draws)) == len(draws)


def test_the_seed_may_be_set_after_iter_was_called():
    """Detectron2 0.5 calls iter() in the trainer's constructor, before a checkpoint is read."""
    late = loader(seed=1)
    iterator = iter(late)
    late.seed, late.start_iteration = 9, 2
    assert take(iterator, 3) == take(loader(seed=9), 5)[2:]


def test_mapping_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = take(iter(lambda: (random.random(), np.random.rand(), float(torch.rand(()))), None), 2)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    first = (random.random(), np.random.rand(), float(torch.rand(())))
    take(loader(), 3)
    with isolated_rng(1, 2, 3):
        torch.rand(5)
    second = (random.random(), np.random.rand(), float(torch.rand(())))
    assert [first, second] == before


def test_isolated_generators_do_not_touch_the_gpu(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with isolated_rng(1, 2):
        inside = (random.random(), np.random.rand(), float(torch.rand(())))
    assert seeded == []
    seed_rng(1, 2)
    assert len(seeded) == 1
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == inside


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_isolated_generators_leave_the_gpus_where_it_is():
    torch.manual_seed(0)
    expected = torch.rand(2, device="cuda")[1]
    torch.manual_seed(0)
    torch.rand((), device="cuda")
    with isolated_rng(1):
        pass
    assert torch.rand((), device="cuda") == expected


def failing_mapper(bad):
    def mapper(record):
        if record["id"] in bad:
            raise ImageReadError(f"{record['id']}.jpg: cannot be read")
        return random_mapper(record)

    return mapper


def test_bad_images_raise_by_default():
    with pytest.raises(ImageReadError, match=r"4\.jpg"):
        take(loader(mapper=failing_mapper({4})), 4)


def test_a_bad_image_is_replaced_reproducibly(caplog):
    with caplog.at_level("WARNING", logger="unseg"):
        batches = take(loader(mapper=failing_mapper({4}), skip_bad=True), 12)
    assert caplog.text.count("4.jpg") == 1  # reported once, though drawn in every epoch
    ids = [sample["id"] for batch in batches for sample in batch]
    assert len(ids) == 36
    assert 4 not in ids
    assert take(loader(mapper=failing_mapper({4}), skip_bad=True, num_workers=2), 12) == batches


@pytest.mark.parametrize("bad", [{1, 2}, set(range(11))])
def test_too_many_bad_images_stop_the_run(bad):
    with pytest.raises(ImageReadError, match=r"2 of the \d+ images .*\(of 11\).*more than 1%"):
        take(loader(mapper=failing_mapper(bad), skip_bad=True), 12)


def test_a_single_bad_image_does_not_hang():
    dataset = DrawDataset([{"id": 0}], failing_mapper({0}), skip_bad=True)
    with pytest.raises(ImageReadError, match="1 of the 1 images"):
        dataset[0, 0]


def images_until_it_stops(bad_share, num_images=20_000, workers=32 * 4, worker=5):
    """Images that one of many workers maps before it raises; None if it does not in an epoch."""
    rng = np.random.default_rng(1)
    bad = set(rng.permutation(num_images)[: int(bad_share * num_images)].tolist())
    tried = []

    def mapper(index):
        tried.append(index)
        if index in bad:
            raise ImageReadError(f"{index}.jpg: cannot be read")

    dataset = DrawDataset(range(num_images), mapper, skip_bad=True)
    draws = enumerate(rng.permutation(num_images).tolist())
    try:
        for draw, index in itertools.islice(draws, worker, None, workers):
            dataset[index, draw]
    except ImageReadError:
        return len(tried)
    return None


@pytest.mark.parametrize(("share", "at_most"), [(1.0, 6), (0.5, 20), (0.1, 100)])
def test_workers_that_see_few_of_many_images_stop_early(share, at_most):
    stops = [images_until_it_stops(share, worker=worker) for worker in range(8)]
    assert min(stop for stop in stops if stop) <= at_most, stops


@pytest.mark.parametrize(("share", "workers"), [(0.001, 1), (0.001, 128), (0.009, 8)])
def test_few_bad_images_never_stop_a_large_run(share, workers, caplog):
    caplog.set_level("ERROR")
    for worker in range(min(workers, 16)):
        assert images_until_it_stops(share, 5000, workers, worker) is None


def test_what_to_do_with_bad_images_is_validated():
    cfg = get_cfg()
    assert not skips_bad_images(cfg)
    cfg.INPUT.ON_BAD_IMAGE = "skip"
    assert skips_bad_images(cfg)
    cfg.INPUT.ON_BAD_IMAGE = "Skip"
    for call in (skips_bad_images, build_train_loader):
        with pytest.raises(ValueError, match="INPUT.ON_BAD_IMAGE must be raise or skip"):
            call(cfg)


class Record(dict):
    """A dict whose lifetime can be watched."""


@pytest.fixture
def watched():
    """The data set ``watched``, and weak references to the dicts of its last loading."""
    alive = []

    def load():
        sizes = {"width": 4, "height": 3}
        annotation = {"category_id": 0, "iscrowd": 0}
        dicts = [
            Record(file_name=f"{i}.png", image_id=i, annotations=[annotation], **sizes)
            for i in range(5)
        ]
        alive[:] = map(weakref.ref, dicts)
        return dicts

    DatasetCatalog.register("watched", load)
    yield alive
    DatasetCatalog.remove("watched")


def watched_cfg(**changes):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("watched",)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 1
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_the_loader_keeps_the_serialised_data_alone(watched):
    cfg = watched_cfg(DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler")
    loader = build_train_loader(cfg)
    gc.collect()
    assert len(watched) == 5
    assert all(reference() is None for reference in watched)
    assert len(loader.dataset) == 5
    assert take(loader.make_batches(1, 0), 1)


def test_the_square_root_of_repeat_factors_may_be_left_out(watched):
    cfg = watched_cfg(
        DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler", DATALOADER__REPEAT_THRESHOLD=4.0
    )
    assert build_train_loader(cfg).make_batches(1, 0).repeat_factors.tolist() == [2.0] * 5
    if "REPEAT_SQRT" not in cfg.DATALOADER:
        pytest.skip("a key of Detectron2 main")
    cfg.DATALOADER.REPEAT_SQRT = False
    assert build_train_loader(cfg).make_batches(1, 0).repeat_factors.tolist() == [4.0] * 5
