"""The cache folder stays below its limit, whoever else reads and writes there."""

import multiprocessing
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from transact_core.base import cache
from transact_core.base.cache import (
    MODEL_IN_USE_SECONDS,
    UNUSED_SECONDS,
    digest,
    evict,
    remembered,
)
from transact_core.base.errors import TransActError
from transact_core.base.files import STAGING_SUFFIX, cache_limit_bytes

KB = 1000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path))
    monkeypatch.delenv("TRANSACT_CACHE_GB", raising=False)
    return tmp_path


def limit(monkeypatch, kilobytes: int) -> None:
    monkeypatch.setenv("TRANSACT_CACHE_GB", f"{kilobytes / 1e6:.6f}")


def entry(folder, name: str, unused: float = 0, kilobytes: int = 100):
    """A measured file, or a model's folder where the name starts with `models/`."""
    path = folder / name
    file = path / "model.safetensors" if name.startswith("models/") else path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(kilobytes * KB))
    used = time.time() - unused
    os.utime(path, (used, used))
    return path


def value(number: int) -> dict[str, torch.Tensor]:
    """100 kB of float32."""
    return {"values": torch.full((25_000,), float(number))}


def test_the_limit_is_read_from_the_environment(monkeypatch):
    assert cache_limit_bytes({}) == 20 * 10**9
    assert cache_limit_bytes({"TRANSACT_CACHE_GB": "0.5"}) == 5 * 10**8


@pytest.mark.parametrize("wrong", ["", "0", "0.0", "-1", "inf", "nan", "1e3", "20 GB", "2_0", "²"])
def test_a_limit_that_is_no_number_is_refused_before_computing(folder, monkeypatch, wrong):
    monkeypatch.setenv("TRANSACT_CACHE_GB", wrong)
    with pytest.raises(TransActError, match=r"TRANSACT_CACHE_GB is .*positive number of gigabytes"):
        remembered({"what": "x"}, lambda: pytest.fail("it was computed"))


def test_the_least_recently_used_are_removed_first(folder):
    old = entry(folder, "measured/old.safetensors", unused=300)
    middle = entry(folder, "models/middle", unused=MODEL_IN_USE_SECONDS + 1)
    new = entry(folder, "measured/new.safetensors", unused=100)
    evict(400 * KB)
    assert [path.exists() for path in (middle, old, new)] == [True, True, True]
    evict(250 * KB)
    assert [path.exists() for path in (middle, old, new)] == [False, True, True]
    evict(150 * KB)
    assert [path.exists() for path in (middle, old, new)] == [False, False, True]
    assert sorted(path.name for path in folder.rglob("*")) == [
        "measured",
        "models",
        "new.safetensors",
    ]


def test_reading_counts_as_use(folder, monkeypatch):
    for number in (1, 2):
        remembered({"what": number}, lambda number=number: value(number))
        path = folder / "measured" / f"{digest({'what': number})}.safetensors"
        os.utime(path, (number, number + time.time() - 1000))
    remembered({"what": 1}, lambda: pytest.fail("it was computed"))
    limit(monkeypatch, 250)
    remembered({"what": 3}, lambda: value(3))
    remembered({"what": 1}, lambda: pytest.fail("it was removed though it was used last"))
    assert remembered({"what": 2}, lambda: value(-2))["values"][0] == -2


def test_what_nobody_used_for_long_is_removed_whatever_the_size(folder):
    kept = [
        entry(folder, "measured/recent.safetensors", unused=UNUSED_SECONDS - 100),
        entry(folder, "models/recent", unused=UNUSED_SECONDS - 100),
        entry(folder, "teacher/recent", unused=UNUSED_SECONDS - 100),
    ]
    removed = [
        entry(folder, "measured/old.safetensors", unused=UNUSED_SECONDS + 100),
        entry(folder, "models/old", unused=UNUSED_SECONDS + 100),
        entry(folder, "teacher/old", unused=UNUSED_SECONDS + 100),
        entry(folder, "results.sqlite.damaged-20260101-000000", unused=UNUSED_SECONDS + 100),
    ]
    evict()
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in removed)


def test_a_model_that_may_still_be_read_stays_above_the_limit(folder):
    loading = entry(folder, "models/loading", unused=MODEL_IN_USE_SECONDS / 2)
    evict(1)
    assert loading.exists()


def test_a_model_that_this_process_opened_stays_however_long_ago(folder, monkeypatch):
    monkeypatch.setattr(cache, "_folders_in_use", set())
    opened = entry(folder, "models/opened")
    other = entry(folder, "models/other", unused=2 * MODEL_IN_USE_SECONDS)
    cache.mark_in_use(opened)
    for unused in (2 * MODEL_IN_USE_SECONDS, 2 * UNUSED_SECONDS):
        os.utime(opened, (time.time() - unused,) * 2)
        evict(1)
        assert opened.exists()
    assert not other.exists()


@pytest.mark.parametrize("opened", [True, False])
def test_models_that_stay_do_not_count_towards_the_limit(folder, monkeypatch, opened):
    """A model larger than the limit would otherwise make every measured file go."""
    monkeypatch.setattr(cache, "_folders_in_use", set())
    model = entry(folder, "models/large", unused=10, kilobytes=500)
    if opened:
        cache.mark_in_use(model)
        os.utime(model, (time.time() - 2 * MODEL_IN_USE_SECONDS,) * 2)
    old, new = (entry(folder, f"measured/{age}.safetensors", age) for age in (300, 100))
    evict(200 * KB)
    assert [path.exists() for path in (model, old, new)] == [True, True, True]
    evict(150 * KB)
    assert [path.exists() for path in (model, old, new)] == [True, False, True]


def test_other_files_are_left_alone(folder):
    others = [
        entry(folder, "uploads/text.txt", unused=2 * UNUSED_SECONDS),
        entry(folder, "results.sqlite", unused=2 * UNUSED_SECONDS),
        entry(folder, "measured/notes.txt", unused=2 * UNUSED_SECONDS),
        entry(folder, f"measured/.x{STAGING_SUFFIX}", unused=2 * UNUSED_SECONDS),
    ]
    evict(1)
    assert all(path.exists() for path in others)


def test_a_link_is_removed_and_not_what_it_leads_to(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("elsewhere") / "model"
    target.mkdir()
    (target / "model.safetensors").write_bytes(bytes(1000))
    os.utime(target, (0, 0))
    (folder / "models").mkdir()
    (folder / "models" / "link").symlink_to(target)
    evict(1)
    assert not (folder / "models" / "link").is_symlink()
    assert (target / "model.safetensors").exists()


def test_the_result_is_returned_even_where_the_limit_is_smaller(folder, monkeypatch):
    limit(monkeypatch, 1)
    assert remembered({"what": 1}, lambda: value(1))["values"][0] == 1
    assert not list((folder / "measured").glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["bit", "torn", "empty", "no checksum", "another entry's"])
def test_a_damaged_entry_is_computed_again_and_replaced(folder, damage):
    remembered({"what": 1}, lambda: value(1))
    path = folder / "measured" / f"{digest({'what': 1})}.safetensors"
    content = path.read_bytes()
    if damage == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no checksum":
        save_file(load_file(path), path)
    else:
        remembered({"what": 2}, lambda: value(2))
        (folder / "measured" / f"{digest({'what': 2})}.safetensors").rename(path)
    assert remembered({"what": 1}, lambda: value(3))["values"][0] == 3
    assert remembered({"what": 1}, lambda: pytest.fail("it was not replaced"))["values"][0] == 3


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.tensor(1.5), "b": torch.zeros(0, 3)},
        {"a": torch.tensor([True, False]), "b": torch.arange(6).reshape(2, 3).T},
        {"a": torch.ones(3, dtype=torch.bfloat16)},
    ],
)
def test_tensors_of_every_kind_come_back_bit_for_bit(folder, tensors):
    remembered({"what": "kinds"}, lambda: tensors)
    again = remembered({"what": "kinds"}, lambda: pytest.fail("it was computed"))
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def use_the_cache(seed: int, sender) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(60):
        number = int(torch.randint(12, (), generator=generator))
        found = remembered({"what": number}, lambda number=number: value(number))
        assert torch.equal(found["values"], value(number)["values"])
    sender.send(True)


@pytest.mark.skipif(os.name != "posix", reason="processes are forked")
def test_processes_that_read_write_and_evict_at_once_get_what_they_asked_for(folder, monkeypatch):
    limit(monkeypatch, 450)
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    processes = [forking.Process(target=use_the_cache, args=(seed, sender)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert all(receiver.recv() for _ in processes)
    evict()
    sizes = [path.stat().st_size for path in (folder / "measured").iterdir()]
    assert 0 < sum(sizes) <= 450 * KB


def test_another_engine_version_is_another_result(folder, monkeypatch):
    remembered({"what": 1}, lambda: value(1))
    monkeypatch.setattr(cache, "ENGINE_VERSION", cache.ENGINE_VERSION + 1)
    assert remembered({"what": 1}, lambda: value(2))["values"][0] == 2


def test_the_packages_version_plays_no_part(folder, monkeypatch):
    before = digest({"what": 1})
    monkeypatch.setattr("transact_core.__version__", "99.0")
    assert digest({"what": 1}) == before


def test_trainings_end_by_their_age_alone(folder):
    kept = folder / "trainings" / "visitor" / "cut"
    kept.mkdir(parents=True)
    (kept / "state.safetensors").write_bytes(bytes(100 * KB))
    evict(0)
    assert (kept / "state.safetensors").exists()
    used = time.time() - UNUSED_SECONDS - 60
    os.utime(kept, (used, used))
    evict(10**9)
    assert not kept.exists()
