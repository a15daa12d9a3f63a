import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import KINDS, make_model
from transact_core.base.errors import Cancelled, TransActError
from transact_core.forward.latency import WARM_UP, Timing, measure_latency

TEXT = torch.arange(2, 50)


@pytest.fixture
def models():
    return {"dense": make_model(**KINDS["gqa"]), "pruned": make_model(intermediate_size=16)}


@pytest.fixture
def calls(models, monkeypatch):
    """Name, tokens fed and tokens cached of every pass."""
    made = []
    for name, model in models.items():

        def forward(ids, past_key_values, *, name=name, real=model.forward, **options):
            made.append((name, ids.shape[1], past_key_values.get_seq_length()))
            return real(ids, past_key_values=past_key_values, **options)

        monkeypatch.setattr(model, "forward", forward)
    return made


def test_models_take_turns_in_an_order_that_turns_round(models, calls):
    points = list(measure_latency(models, TEXT, [8, 100], decode=2, repeats=3))
    one_run = [(8, 0), (1, 8), (1, 9)]
    order = ["dense", "pruned", "pruned", "dense"] * 2
    first_length = calls[: len(calls) // 2]
    assert first_length == [(name, *each) for name in order for each in one_run]
    assert calls[len(calls) // 2] == ("dense", 100, 0)
    assert [(point.model, point.length) for point in points] == [
        ("dense", 8),
        ("pruned", 8),
        ("dense", 100),
        ("pruned", 100),
    ]
    for point in points:
        assert len(point.prefill.seconds) == len(point.decode.seconds) == 3
        assert min(point.prefill.seconds + point.decode.seconds) > 0
        assert point.prefill_tokens_per_second == point.length / point.prefill.median
        assert point.working_bytes is None


def test_points_come_as_they_are_measured_and_a_cancel_stops_the_next(models):
    asked = []

    def report(stage, done, total):
        asked.append((done, total))
        if len(asked) > 2 * (WARM_UP + 1):
            raise Cancelled

    stream = measure_latency(models, TEXT, [4, 8], decode=1, repeats=1, progress=report)
    assert [next(stream).model, next(stream).model] == ["dense", "pruned"]
    with pytest.raises(Cancelled):
        next(stream)
    assert asked == [(done, 8) for done in range(5)]


def test_a_length_that_does_not_fit_is_refused_before_anything_runs(models, calls):
    with pytest.raises(TransActError, match=r"250 tokens does not fit .* the longest is 246"):
        next(measure_latency(models, TEXT, [8, 250], decode=10))
    assert calls == []


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20).map(tuple))
def test_the_median_lies_between_the_quartiles(seconds):
    timing = Timing(seconds)
    lower, upper = timing.quartiles
    assert min(seconds) <= lower <= timing.median <= upper <= max(seconds)
    ordered = sorted(seconds)
    half = len(seconds) // 2
    middle = ordered[half] if len(seconds) % 2 else (ordered[half - 1] + ordered[half]) / 2
    assert timing.median == pytest.approx(middle)
