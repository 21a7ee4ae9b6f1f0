"""Sharded jobs: the same results for any number of processes, kills and restarts."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from processes import wait_until

from unseg.engine.sharded_map import WorkDir, sharded_map


def load(unit):
    return unit * 10


def square(value):
    return {"value": value * value, "text": 'quotes " and \n lines'}, 1


def work_through(work, shard=0, num_shards=1, process=square, **options):
    units = [u for u in work.missing() if u % num_shards == shard]
    sharded_map(load, process, work, units, name=f"{shard}-of-{num_shards}", **options)


EXPECTED = [square(load(u))[0] for u in range(23)]


def open_job(path, resume=False, job=None):
    work = WorkDir(path, job or {"a": 1}, 23)
    work.open(resume=resume)
    return work


@pytest.mark.parametrize("num_shards", [1, 2, 5, 30])
def test_any_number_of_shards(tmp_path, num_shards):
    work = open_job(tmp_path / "job")
    for shard in range(num_shards):
        work_through(work, shard, num_shards)
    assert list(work.results()) == EXPECTED


def test_workers_do_not_change_the_order_or_result(tmp_path):
    work = open_job(tmp_path / "job")
    work_through(work, num_workers=2)
    assert list(work.results()) == EXPECTED


def test_resume_with_another_number_of_shards_does_only_what_is_missing(tmp_path):
    work = open_job(tmp_path / "job")
    work_through(work, 1, 3)
    work = open_job(tmp_path / "job", resume=True)
    seen = []

    def remember(value):
        seen.append(value // 10)
        return square(value)

    for shard in range(2):
        work_through(work, shard, 2, process=remember)
    assert sorted(seen) == [u for u in range(23) if u % 3 != 1]
    assert list(work.results()) == EXPECTED


def test_without_resume_everything_is_done_again(tmp_path):
    work_through(open_job(tmp_path / "job"))
    work = open_job(tmp_path / "job")
    assert work.finished() == {}
    with pytest.raises(RuntimeError, match="23 of 23 units are missing"):
        list(work.results())


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_half_written_line_is_done_again(tmp_path, cut):
    work = open_job(tmp_path / "job")
    work_through(work)
    (shard,) = (tmp_path / "job").glob("shard-*")
    data = shard.read_bytes()
    shard.write_bytes(data[:-cut])
    work = open_job(tmp_path / "job", resume=True)
    assert len(work.finished()) == 22
    work_through(work)
    assert list(work.results()) == EXPECTED
    assert shard.read_bytes() == data


def test_other_settings_are_refused_by_name(tmp_path):
    open_job(tmp_path / "job", job={"model": {"depth": 50, "norm": "BN"}})
    with pytest.raises(ValueError, match=r"different: job\.model\.depth"):
        open_job(tmp_path / "job", resume=True, job={"model": {"depth": 101, "norm": "BN"}})


def _slow(value):
    time.sleep(0.05)
    return square(value)


def _work(path):
    work_through(open_job(path, resume=True), process=_slow)


def test_killed_again_and_again(tmp_path):
    """kill -9 at odd moments; the collected results are those of an undisturbed run."""
    work = open_job(tmp_path / "job")
    context = multiprocessing.get_context("spawn")
    for delay in (0.12, 0.07):
        before = work.missing()
        process = context.Process(target=_work, args=(tmp_path / "job",), daemon=True)
        process.start()
        wait_until(lambda before=before, p=process: work.missing() != before or not p.is_alive())
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert work.missing()  # the last one killed had not come to the end
    _work(tmp_path / "job")
    assert list(open_job(tmp_path / "job", resume=True).results()) == EXPECTED


def test_a_shard_belongs_to_one_process(tmp_path):
    work = open_job(tmp_path / "job")

    def meddle(value):
        with pytest.raises(RuntimeError, match="another process is working on"):
            work_through(work)
        return square(value)

    work_through(work, process=meddle)
    assert list(work.results()) == EXPECTED


def _finish(path, ready, results):
    work = open_job(path, resume=True)
    ready.release()
    with work.lock() as locked:
        entered = time.monotonic()
        if locked:
            time.sleep(0.5)
            work.remove()
        results.put((entered, time.monotonic(), locked))


def test_who_comes_second_waits_for_the_lock_and_finds_the_folder_gone(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, results = context.Semaphore(0), context.Queue()
    work = open_job(tmp_path / "job")
    with work.lock() as locked:  # so that both of the others have to wait
        assert locked
        arguments = (work.path, ready, results)
        processes = [context.Process(target=_finish, args=arguments, daemon=True) for _ in range(2)]
        for process in processes:
            process.start()
        for _ in processes:
            assert ready.acquire(timeout=120)
        time.sleep(0.1)
        assert results.empty()
    first, second = sorted(results.get(timeout=10) for _ in range(2))
    for process in processes:
        process.join()
    assert (first[2], second[2]) == (True, False)
    assert second[0] >= first[1]
    with WorkDir(tmp_path / "nothing", {}, 1).lock() as locked:
        assert not locked


def test_a_folder_killed_while_removed_still_belongs_to_its_job(tmp_path, monkeypatch):
    work = open_job(tmp_path / "job")
    work_through(work)
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    work.remove()
    assert [p.name for p in work.path.iterdir()] == ["job.json"]


def test_lines_are_json_with_the_unit_first(tmp_path):
    """`finished` reads the number without parsing the line: the format must not drift."""
    work_through(open_job(tmp_path / "job"))
    (shard,) = (tmp_path / "job").glob("shard-*")
    for unit, line in enumerate(shard.read_text().splitlines()):
        assert line.startswith(f'{{"unit":{unit},"result":')
        assert json.loads(line) == {"unit": unit, "result": EXPECTED[unit]}
