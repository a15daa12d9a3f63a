"""Free memory inside a container."""

import psutil
import pytest

from transact_core.models import devices
from transact_core.models.devices import available_memory

MB = 1_000_000


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A control group's folder in place of the machine's own."""
    (tmp_path / "memory").mkdir()
    old = (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    groups = ((tmp_path, "memory.max", "memory.current"), old)
    monkeypatch.setattr(devices, "CONTROL_GROUPS", groups)
    machine = psutil.virtual_memory()._replace(available=9_000 * MB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return tmp_path


def write(folder, limit, usage, stat, names=("memory.max", "memory.current")):
    for name, content in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


def test_page_cache_does_not_count_as_used(group):
    stat = f"anon {300 * MB}\nfile {650 * MB}\nshmem {50 * MB}\ninactive_file {400 * MB}\n"
    stat += f"active_file {200 * MB}\nslab_reclaimable {20 * MB}"
    write(group, 1_000 * MB, 970 * MB, stat)
    assert available_memory() == (1_000 - 970 + 400 + 200 + 20) * MB


def test_cgroup_1_is_read_too(group):
    stat = f"active_file 5\ntotal_inactive_file {400 * MB}\ntotal_active_file {100 * MB}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write(group / "memory", 1_000 * MB, 900 * MB, stat, names)
    assert available_memory() == 600 * MB


def test_without_a_limit_the_machine_decides(group):
    assert available_memory() == 9_000 * MB
    write(group, "max", 970 * MB, "active_file 0")
    assert available_memory() == 9_000 * MB
    write(group, 2**60, 970 * MB, "active_file 0")
    assert available_memory() == 9_000 * MB


def test_what_is_full_has_nothing_left(group):
    write(group, 100 * MB, 120 * MB, "active_file 0")
    assert available_memory() == 0


def test_a_damaged_file_is_passed_over(group):
    write(group, 500 * MB, 120 * MB, "active_file")
    assert available_memory() == 380 * MB
    (group / "memory.stat").unlink()
    assert available_memory() == 380 * MB
    (group / "memory.max").write_text("")
    assert available_memory() == 9_000 * MB
