"""Kept points: exact, found by what determined them, and never in the way."""

import math
import multiprocessing
import os
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import fields, replace

import pytest
import torch

from tests.conftest import KINDS, bench_of, loaded_from, make_model, windows_for
from transact_core.base import cache
from transact_core.base.cache import UNUSED_SECONDS
from transact_core.experiments import results
from transact_core.experiments.bench import Bench, Choices, Measurement, compress
from transact_core.forward.perplexity import Evaluation
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, Decision


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A cache of the test's own; the path of its file of results."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(results, "notices", [])
    return tmp_path / "cache" / "results.sqlite"


def same(one: Measurement, other: Measurement) -> bool:
    """Every field bit for bit; NaN is itself."""

    def equal(a: object, b: object) -> bool:
        if isinstance(a, Evaluation):
            return a.nll.dtype == b.nll.dtype and torch.equal(a.nll, b.nll)
        return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))

    return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Measurement))


def measure(bench: Bench, pair=(0.5, 0.3), choices: Choices | None = None) -> Measurement:
    choices = choices or Choices()
    decision = results.decided(bench, *pair, choices)
    return results.measured(bench, decision, choices.recovery)


def forbidden(*_):
    pytest.fail("it was measured again")


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "auto"])
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_point_comes_back_as_it_was(store, gqa_bench, granularity, recovery):
    choices = Choices(granularity=granularity, recovery=recovery, steps=2)
    point = measure(gqa_bench, choices=choices)
    again = Bench(gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation)
    decision = results.find_decision(again, 0.5, 0.3, choices)
    assert decision == point.decision
    assert decision.why == point.decision.why
    assert same(results.measured(again, decision, recovery, compress=forbidden), point)


def test_numbers_that_are_none_come_back_too(store, gqa_bench):
    point = compress(gqa_bench, gqa_bench.plan(0.5, 0.3, Choices()), "none")[1]
    point = replace(point, delta_nll=math.inf, delta_nll_se=math.nan)
    results.keep(gqa_bench, point)
    assert same(results.find(gqa_bench, point.decision, "none"), point)


def test_a_point_belongs_to_the_cut_and_not_to_the_ratios(store, gqa_bench):
    first = measure(gqa_bench, (0.5, 0.3))
    decision = Decision(gqa_bench.plan(0.49, 0.301, Choices()))
    assert decision.plan.layers == first.plan.layers
    found = results.measured(gqa_bench, decision, "least-squares", compress=forbidden)
    assert found.plan.mha_ratio == 0.49
    assert found.perplexity == first.perplexity
    assert found.seconds == first.seconds


def test_whatever_else_is_another_point(store, gqa_bench, tokenizer, windows):
    first = measure(gqa_bench)
    decision, recovery = first.decision, first.recovery
    assert results.find(gqa_bench, decision, recovery) is not None
    loaded = gqa_bench.loaded
    others = {
        "recovery": (gqa_bench, decision, "none"),
        "channels": (gqa_bench, Decision(gqa_bench.plan(0.5, 0.4, Choices())), recovery),
        "importance": (
            gqa_bench,
            Decision(decision.plan.model_copy(update={"importance": "random"})),
            recovery,
        ),
        "weights": (
            bench_of(make_model(**KINDS["wide-heads"]), tokenizer, windows),
            decision,
            recovery,
        ),
        "calibration": (
            Bench(loaded, windows_for(tokenizer, calibration_tokens=512)[0], windows[1]),
            decision,
            recovery,
        ),
        "evaluation": (
            Bench(loaded, windows[0], windows_for(tokenizer, evaluation_tokens=128)[1]),
            decision,
            recovery,
        ),
        "saved dtype": (Bench(loaded, *windows, save_dtype="bfloat16"), decision, recovery),
        "seed": (Bench(loaded, *windows, seed=1), decision, recovery),
    }
    for name, asked in others.items():
        assert results.find(*asked) is None, name
    assert results.find_decision(gqa_bench, 0.5, 0.3, Choices("auto")) is None


def test_another_number_of_threads_is_another_point(store, gqa_bench):
    point = measure(gqa_bench)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert results.find(gqa_bench, point.decision, point.recovery) is None
    finally:
        torch.set_num_threads(threads)
    assert results.find(gqa_bench, point.decision, point.recovery) is not None


def test_a_released_model_is_not_needed_to_find_its_points(store, gqa_bench):
    point = measure(gqa_bench)
    gqa_bench.release_model()
    assert same(measure(gqa_bench), point)


@pytest.mark.parametrize("damage", ["overwritten", "torn", "emptied", "another program's"])
def test_a_damaged_file_is_set_aside_with_a_notice(store, gqa_bench, damage):
    point = measure(gqa_bench)
    with sqlite3.connect(store) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = store.read_bytes()
    store.write_bytes(
        {
            "overwritten": content[:100] + os.urandom(len(content) - 100),
            "torn": content[: len(content) // 2],
            "emptied": b"",
            "another program's": b"not a database at all " * 100,
        }[damage]
    )
    again = measure(gqa_bench)
    assert again.perplexity == point.perplexity
    # What could be made of it is kept from then on.
    assert same(measure(gqa_bench), again)
    assert same(
        results.measured(gqa_bench, point.decision, point.recovery, compress=forbidden), again
    )
    if damage != "emptied":
        assert [path for path in store.parent.iterdir() if "damaged" in path.name]
        assert "set aside" in results.notices[0]
        assert len(results.notices) == 1


def test_a_record_with_a_flipped_bit_is_measured_again(store, gqa_bench):
    point = measure(gqa_bench)
    with sqlite3.connect(store) as database:
        (nll,) = database.execute("SELECT nll FROM points").fetchone()
        flipped = bytes([nll[0] ^ 1]) + nll[1:]
        database.execute("UPDATE points SET nll = ?", (flipped,))
    database.close()
    assert results.find(gqa_bench, point.decision, point.recovery) is None
    assert same(replace(measure(gqa_bench), seconds=point.seconds), point)


def test_a_file_of_a_newer_version_is_left_alone(store, gqa_bench):
    measure(gqa_bench)
    with sqlite3.connect(store) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = store.read_bytes()
    point = measure(gqa_bench)
    assert results.find(gqa_bench, point.decision, point.recovery) is None
    assert store.read_bytes() == before
    assert "newer version" in results.notices[0]


SCHEMA_1 = (
    "CREATE TABLE {} (key TEXT PRIMARY KEY, record TEXT, nll BLOB, sha256 TEXT) WITHOUT ROWID"
)


def test_a_file_of_schema_1_is_begun_anew(store, gqa_bench):
    store.parent.mkdir()
    with closing(sqlite3.connect(store, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for table in ("points", "decisions"):
            database.execute(SCHEMA_1.format(table))
            database.execute(f"INSERT INTO {table} VALUES ('old', '{{}}', x'00', 'sha')")
        database.execute("PRAGMA user_version = 1")
    point = measure(gqa_bench)
    assert same(
        results.measured(gqa_bench, point.decision, point.recovery, compress=forbidden), point
    )
    assert rows(store) == 1
    assert results.notices == []


def rows(store, table: str = "points") -> int:
    with closing(sqlite3.connect(store)) as database:
        return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def age(store, key: str, seconds: float) -> None:
    """Makes a record's last use so many seconds ago."""
    with closing(sqlite3.connect(store)) as database, database:
        database.execute(
            "UPDATE points SET used = ? WHERE key = ?", (int(time.time() - seconds), key)
        )


def test_points_that_nobody_read_for_long_are_removed(store):
    for number in range(3):
        results._write("points", f"point-{number}", {"number": number})
    for number in range(3):
        age(store, f"point-{number}", UNUSED_SECONDS + 100)
    assert kept("point", 1)  # Reading is a use.
    results._write("points", "point-3", {"number": 3})
    assert [kept("point", number) for number in range(4)] == [False, True, False, True]


def test_the_least_recently_read_points_are_removed_above_the_limit(store, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE_GB", "0.01")
    for number in range(100):
        results._write("points", f"point-{number}", {"number": number}, bytes(50_000))
        age(store, f"point-{number}", 1000 - number)
    found = [kept("point", number) for number in range(100)]
    assert 5 < sum(found) < 25
    assert found == sorted(found)
    assert store.stat().st_size < 1.2e6


def test_a_limit_smaller_than_a_point_keeps_none_and_ends(store, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE_GB", "0.000001")
    results._write("points", "point-0", {"number": 0})
    assert not kept("point", 0)
    assert rows(store) == 0


def test_another_engine_version_is_another_point(store, gqa_bench, monkeypatch):
    point = measure(gqa_bench)
    monkeypatch.setattr(cache, "ENGINE_VERSION", cache.ENGINE_VERSION + 1)
    assert results.find(gqa_bench, point.decision, point.recovery) is None
    monkeypatch.setattr(cache, "ENGINE_VERSION", cache.ENGINE_VERSION - 1)
    monkeypatch.setattr("transact_core.__version__", "99.0")
    assert results.find(gqa_bench, point.decision, point.recovery) is not None


def test_a_file_that_cannot_be_written_is_done_without(store, gqa_bench):
    store.parent.mkdir()
    store.mkdir()
    point = measure(gqa_bench)
    assert point.perplexity > 1
    assert results.find(gqa_bench, point.decision, point.recovery) is None


def test_a_full_disk_is_done_without(store, gqa_bench, monkeypatch):
    measure(gqa_bench, (0.5, 0.0))
    connect = sqlite3.connect

    def full(*arguments, **options):
        database = connect(*arguments, **options)
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")
        return database

    monkeypatch.setattr(sqlite3, "connect", full)
    assert measure(gqa_bench, (0.0, 0.5)).perplexity > 1
    assert (
        results.find(gqa_bench, Decision(gqa_bench.plan(0.0, 0.5, Choices())), "least-squares")
        is None
    )
    assert results.notices == []


def test_threads_that_keep_and_find_at_once(store, gqa_bench):
    plan = gqa_bench.plan(0.5, 0.3, Choices())
    point = compress(gqa_bench, plan, "none")[1]
    made = [
        replace(point, recovery=f"{thread}-{number}") for thread in range(6) for number in range(8)
    ]

    def work(mine):
        for point in mine:
            results.keep(gqa_bench, point)
            assert same(results.find(gqa_bench, point.decision, point.recovery), point)

    threads = [threading.Thread(target=work, args=(made[start::6],)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for point in made:
        assert same(results.find(gqa_bench, point.decision, point.recovery), point)


def write_many(name: str, count: int, start, sender) -> None:
    start.wait(30)
    for number in range(count):
        results._write("points", f"{name}-{number}", {"number": number}, bytes(20_000))
        sender.send(number)


def start_writer(name: str, count: int, start):
    """A process that keeps records, and the end of a pipe that gets the number of each."""
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    writer = forking.Process(target=write_many, args=(name, count, start, sender))
    writer.start()
    sender.close()
    return writer, receiver


def kept(name: str, number: int) -> bool:
    record = results._read("points", f"{name}-{number}", lambda record, _: record)
    return record == {"number": number}


def test_processes_that_begin_a_file_at_once_all_keep(store):
    start = multiprocessing.get_context("fork").Event()
    writers = [start_writer(f"writer-{number}", 20, start) for number in range(4)]
    start.set()
    for writer, _ in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert all(kept(f"writer-{writer}", number) for writer in range(4) for number in range(20))


def test_a_file_that_another_is_beginning_is_waited_for(store):
    store.parent.mkdir()
    other = sqlite3.connect(store, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    end = threading.Timer(0.3, other.execute, ("COMMIT",))
    end.start()
    results._write("points", "waiting-0", {"number": 0})
    end.join()
    other.close()
    assert kept("waiting", 0)


def test_what_was_kept_survives_a_kill(store):
    start = multiprocessing.get_context("fork").Event()
    start.set()
    for attempt in range(8):
        writer, receiver = start_writer(f"killed-{attempt}", 100_000, start)
        written = [receiver.recv() for _ in range(3 * attempt + 1)]
        writer.kill()
        writer.join(10)
        assert all(kept(f"killed-{attempt}", number) for number in written)
    assert results.notices == []
    results._write("points", "after-0", {"number": 0})
    assert kept("after", 0)


def test_a_point_is_kept_on_every_text(store, gqa_model, tokenizer, windows):
    """On each as if it were the bench's first; where one is missing, nothing is found."""
    calibration, evaluation = windows
    other = windows_for(tokenizer, evaluation_tokens=128)[1]
    loaded = loaded_from(gqa_model, tokenizer)
    bench = Bench(loaded, calibration, evaluation, other)
    plan = bench.plan(0.5, 0.3, Choices())
    decision = Decision(plan)
    point = results.measured(bench, decision, "least-squares")
    assert [len(losses.nll) for losses in point.others] == [4]
    again = results.find(Bench(loaded, calibration, evaluation, other), decision, "least-squares")
    assert torch.equal(again.evaluation.nll, point.evaluation.nll)
    assert torch.equal(again.others[0].nll, point.others[0].nll)
    first = results.find(Bench(loaded, calibration, other), decision, "least-squares")
    assert torch.equal(first.evaluation.nll, point.others[0].nll)
    alone = compress(Bench(loaded, calibration, other), plan, "least-squares")[1]
    assert first.delta_nll == pytest.approx(alone.delta_nll, abs=1e-6)
    third = windows_for(tokenizer, evaluation_tokens=64)[1]
    assert (
        results.find(Bench(loaded, calibration, evaluation, third), decision, "least-squares")
        is None
    )
