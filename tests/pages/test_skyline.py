"""Bars as text, and the tables that the browser draws them from."""

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.live import Position
from pages.live.skyline import (
    Bar,
    bar_tables,
    bars_of,
    by_hand_of,
    fitted,
    fixed_of,
    price_tables,
    text_of,
    texts_of,
    why_fixed,
)
from transact_core.experiments.bench import Choices
from transact_core.planning.allocation import LossLaw
from transact_core.planning.preview import layer_costs

bars = st.lists(st.builds(Bar, st.integers(1, 9), st.booleans()), min_size=1, max_size=12)


def test_layers_that_are_alike_are_one_part():
    text = text_of([Bar(9)] * 4 + [Bar(6, True)] + [Bar(9)] * 25)
    assert text == "9x4.6h.9x25"
    assert len(bars_of(text)) == 30
    assert fixed_of(text, "") == {"mha": {4: 6}, "mlp": {}}


@given(bars)
def test_a_text_gives_its_bars_back(given_bars):
    assert bars_of(text_of(given_bars)) == tuple(given_bars)


@pytest.mark.parametrize("text", ["", "9x", "h", "9.", "9xx2", "-3", "9x99999", "9 x2", "9x9999"])
def test_other_texts_stand_for_no_bars(text):
    assert bars_of(text) == ()


def test_both_modules_have_as_many_layers():
    assert by_hand_of("9x2", "40.20") == ((9, 40), (9, 20))
    assert by_hand_of("9x2", "40x3") == ()
    assert texts_of(((9, 40), (9, 20))) == ("9x2", "40.20")
    assert texts_of(()) == ("", "")


def test_an_address_with_sliders_has_the_bars_that_it_names():
    left = Position(10, 20, 512, "9x2", "40.20")
    assert Position.read({}, left) == left
    assert Position.read({"context": "64"}, left).heads == "9x2"
    assert Position.read({"mha": "50"}, left).by_hand == ()
    assert Position.read({"heads": "6x2", "channels": "8x2"}, left).by_hand == ((6, 8), (6, 8))
    assert Position.read({"heads": "6x2", "channels": "8x3"}, left).by_hand == ()


def test_bars_move_to_what_can_be(gqa_bench):
    shape = gqa_bench.loaded.architecture
    costs = layer_costs(shape, "query-heads", 16)
    # 3 or 6 heads; 16, 32 or all 40 channels; the wider one on a tie.
    assert fitted("6.5h.4", "39.24h.1", costs, 3) == ("6.6h.3", "40.32h.16")
    assert fitted("6x2", "40x2", costs, 3) == ("", "")


def test_bars_are_fixed_where_layers_cannot_differ(gqa_bench):
    shape = gqa_bench.loaded.architecture
    for choices in (Choices("auto"), Choices("head-dims"), Choices(steps=2)):
        assert bar_tables(shape, choices)["fixed"] == why_fixed(choices) != ""
        assert "mha" not in bar_tables(shape, choices)
    tables = bar_tables(shape, Choices(multiple_of=16))
    assert tables["mha"]["units"] == [3, 6]
    assert (tables["mlp"]["least"], tables["mlp"]["step"], tables["mlp"]["most"]) == (16, 16, 40)


def test_losses_are_those_of_the_laws_at_the_errors(gqa_bench):
    shape, damage = gqa_bench.loaded.architecture, gqa_bench.damage(Choices())
    laws = {"mha": (LossLaw(2.0, 1.0),) * 3, "mlp": tuple(LossLaw(n, 1.5) for n in (1.0, 2.0, 3.0))}
    tables = price_tables(damage, laws, layer_costs(shape, "query-heads"), shape.head_dim)
    mlp = np.frombuffer(base64.b64decode(tables["mlp"]["losses"]), "<f4").reshape(3, -1)
    assert tables["mlp"]["units"] == list(range(1, 41))
    assert mlp[1] == pytest.approx(2 * damage.mlp.errors[1].numpy() ** 1.5, rel=1e-5)
    mha = np.frombuffer(base64.b64decode(tables["mha"]["losses"]), "<f4").reshape(3, -1)
    assert tables["mha"]["units"] == [3, 6]
    assert mha[:, 0] == pytest.approx(2 * damage.mha.errors[:, 0].numpy(), rel=1e-5)
    assert (mha[:, 1] == 0).all()
