"""ENGINE_VERSION is raised whenever numbers change, so that no kept result is taken for a new one."""

import json

import numpy as np
import pytest

from tests.trust import engine_numbers
from tests.trust.engine_numbers import COMMAND, changed, make_bench, recorded
from transact_core.base import cache
from transact_core.experiments.bench import Choices
from transact_core.importance.scores import IMPORTANCES
from transact_core.pruning import closed_form
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES


def test_the_numbers_are_those_recorded_with_the_engine_version():
    version, before = recorded()
    now = engine_numbers.compute()
    different = changed(now, before)
    assert not different, (
        f"Numbers changed ({', '.join(different[:5])}, {len(different)} in all): raise "
        f"ENGINE_VERSION in transact_core/base/cache.py and record anew with `{COMMAND}`."
    )
    assert version == cache.ENGINE_VERSION, (
        f"ENGINE_VERSION is {cache.ENGINE_VERSION} and the numbers were recorded with {version}: "
        f"record anew with `{COMMAND}`."
    )
    assert now.keys() == before.keys(), (
        f"{', '.join(sorted(now.keys() - before.keys()))} are not recorded: run `{COMMAND}`."
    )


def test_every_importance_granularity_and_recovery_is_recorded():
    _, numbers = recorded()
    for importance in IMPORTANCES:
        assert len(numbers[f"scores, {importance}, heads"]) == 2 * 6
    for granularity in GRANULARITIES:
        for recovery in RECOVERIES:
            assert len(numbers[f"NLL by window, {granularity}, {recovery}"]) == 16
            assert len(numbers[f"damage, {granularity}, {recovery}, mlp"]) == 2 * 40
    assert all(np.isfinite(values).all() for values in numbers.values())


def test_a_change_of_the_engine_is_noticed(monkeypatch):
    """One fold less changes what a repair is fitted to by little, and the numbers show it."""
    _, before = recorded()
    choices = Choices(importance="reconstruction")

    def cut() -> dict[str, list[float]]:
        return engine_numbers._cut(make_bench(), choices)

    before = {name: before[name] for name in cut()}
    assert not changed(cut(), before)
    monkeypatch.setattr(closed_form, "FOLDS", closed_form.FOLDS - 1)
    assert "NLL by window, query-heads, least-squares" in changed(cut(), before)


@pytest.mark.parametrize(
    ("now", "before", "names"),
    [
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.0001]}, []),
        ({"head-dims, least-squares": [2.0]}, {"head-dims, least-squares": [2.001]}, []),
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.001]}, ["a"]),
        ({"a": [0.0, 0.0]}, {"a": [0.0, 0.0]}, []),
        ({"a": [float("nan")]}, {"a": [1.0]}, ["a"]),
        ({"a": [1.0]}, {"a": [1.0, 1.0]}, ["a"]),
        ({"a": [1.0]}, {"b": [1.0]}, ["b"]),
        ({"a": [1.0], "new": [2.0]}, {"a": [1.0]}, []),
    ],
)
def test_what_counts_as_a_change(now, before, names):
    assert changed(now, before) == names


def test_changed_numbers_are_not_recorded_under_the_same_version(tmp_path, monkeypatch):
    file = tmp_path / "numbers.json"
    monkeypatch.setattr(engine_numbers, "FILE", file)
    monkeypatch.setattr(engine_numbers, "compute", lambda: {"a": [1.0]})
    engine_numbers.main()
    monkeypatch.setattr(engine_numbers, "compute", lambda: {"a": [2.0]})
    with pytest.raises(SystemExit, match=r"Numbers changed \(a, 1 in all\).*raise it"):
        engine_numbers.main()
    assert json.loads(file.read_text())["numbers"] == {"a": [1.0]}
    monkeypatch.setattr(cache, "ENGINE_VERSION", cache.ENGINE_VERSION + 1)
    engine_numbers.main()
    assert recorded() == (cache.ENGINE_VERSION, {"a": [2.0]})
