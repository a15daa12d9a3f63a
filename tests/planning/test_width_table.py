"""Tables of widths with made-up errors and losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture
from transact_core.planning.allocation import LossLaw
from transact_core.planning.damage import Curve, Damage
from transact_core.planning.width_table import (
    FLOOR,
    LEAST_PART,
    NONE_FIXED,
    WidthTable,
    equal_uniform_errors,
)
from transact_core.pruning.plan import widths

EVEN = np.array([0.5, 0.5])
"""Weights of two kinds of text."""
SHAPE = Architecture(48, 40, 4, 6, 3, 8, 320, False, False, False)


def curve(known: torch.Tensor) -> Curve:
    """The same errors in all layers."""
    missing = 1 - known / known[-1]
    return Curve(known, (missing**1.5).double().expand(4, -1))


DAMAGE = Damage(mha=curve(torch.tensor([24, 48])), mlp=curve(torch.arange(1, 41)))


def table(
    mha=0.5, mlp=0.3, traded=False, kept_whole=(), multiple_of=1, fixed=NONE_FIXED
) -> WidthTable:
    uniform = widths(SHAPE, mha, mlp, "query-heads", multiple_of)
    return WidthTable.of(
        SHAPE,
        uniform,
        {"mha": mha, "mlp": mlp},
        "query-heads",
        multiple_of,
        DAMAGE,
        traded,
        kept_whole,
        fixed,
    )


def channels(of: WidthTable) -> list[int]:
    return [layer.intermediate_size for layer in of.layer_widths()]


def losses(of: WidthTable, factors: list[float], kinds: int = 2) -> dict[str, np.ndarray]:
    """Each layer's error at its levels times its factor, the same on all kinds."""
    return {
        name: np.stack([module.errors[:, module.levels()]] * kinds, axis=-1)
        * np.array(factors)[:, None, None]
        for name, module in of.modules.items()
    }


def test_costs_are_those_of_the_architecture():
    of = table()
    for name, prefix in (("mha", "self_attn."), ("mlp", "mlp.")):
        module = of.modules[name]
        for units, cost in zip(module.units, module.costs, strict=True):
            kept = {"num_attention_heads": units} if name == "mha" else {"intermediate_size": units}
            shapes = replace(SHAPE, **kept).layer_tensors(0).items()
            assert cost == sum(
                int(np.prod(shape)) for key, shape in shapes if key.startswith(prefix)
            )


def test_layers_of_equal_losses_are_cut_alike():
    assert channels(table(mha=0)) == [28] * 4
    assert channels(table(mha=0, multiple_of=8)) == [32] * 4


def test_dear_layers_keep_more_and_the_floor_holds():
    of = table(mha=0)
    priced = of.priced(losses(of, [1000.0, 1.0, 1e-6, 1.0]), EVEN)
    kept = channels(priced)
    assert sum(kept) == 4 * 28
    assert kept[0] > kept[1] > kept[2] >= FLOOR * 28
    assert abs(kept[1] - kept[3]) <= 1
    for law, factor in zip(priced.modules["mlp"].laws, [1000, 1, 1e-6, 1], strict=True):
        assert law.exponent == pytest.approx(1)
        assert law.scale == pytest.approx(factor, rel=1e-3)


def test_no_kind_of_text_decides_alone_because_all_lose_much_there():
    of = table(mha=0)
    one, other = losses(of, [4, 1, 1, 1])["mlp"], losses(of, [1, 1, 1, 4])["mlp"]
    mixed = np.concatenate([one[..., :1], 100 * other[..., :1]], axis=-1)
    kept = channels(of.priced({"mlp": mixed}, EVEN))
    assert abs(kept[0] - kept[3]) <= 1
    assert kept[0] > kept[1]


def test_parts_of_a_cut_move_the_losses_half_the_way():
    of = table(mha=0).priced(losses(table(mha=0), [1.0] * 4), EVEN)
    layers = of.layer_widths()
    error = float(of.modules["mlp"].errors[0, of.modules["mlp"].place_of(28)])
    parts = np.array([[4.0], [1.0], [1.0], [-1.0]]) * error
    repriced = of.repriced({"mlp": parts}, layers, np.ones(1))
    scales = [law.scale for law in repriced.modules["mlp"].laws]
    ratio = 6 / 4
    expected = [(part * ratio) ** 0.5 for part in (4, 1, 1, LEAST_PART * ratio)]
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    kept = channels(repriced)
    assert kept[0] > kept[1] > kept[3]
    assert sum(kept) == 4 * 28


def test_traded_widths_share_one_budget():
    of = table(traded=True)
    # Heads are worth nothing, so channels stay in their place.
    dear = losses(of, [1.0] * 4)
    dear["mha"] = dear["mha"] * 1e-6
    layers = of.priced(dear, EVEN).layer_widths()
    uniform = SHAPE.with_layers(table(mha=0.5).layer_widths()).parameters
    assert all(layer.num_attention_heads == 3 for layer in layers)
    assert SHAPE.with_layers(layers).parameters <= uniform
    cheap = losses(of, [1.0] * 4)
    cheap["mha"] = cheap["mha"] * 1e6
    kept = of.priced(cheap, EVEN).layer_widths()
    assert all(layer.num_attention_heads == 6 for layer in kept)
    assert uniform - 3 * 48 < SHAPE.with_layers(kept).parameters <= uniform


def test_layers_that_are_kept_whole_may_leave_too_little():
    assert channels(table(mha=0, kept_whole=(1,)))[1] == 40
    with pytest.raises(TransActError, match="keep fewer layers"):
        table(mha=0, mlp=0.9, kept_whole=(0, 1)).layer_widths()


def test_what_is_fixed_counts_towards_the_budget():
    of = table(fixed={"mlp": {0: 10, 2: 40}, "mha": {1: 3}})
    layers = of.layer_widths()
    kept = [layer.intermediate_size for layer in layers]
    assert (kept[0], kept[2]) == (10, 40)
    assert sum(kept) == 4 * 28
    assert kept[1] == kept[3]
    heads = [layer.num_attention_heads for layer in layers]
    assert heads[1] == 3
    assert sum(heads) == 4 * 3
    # A module whose ratio is 0 is cut only where it is fixed.
    alone = table(mha=0, fixed={"mha": {1: 3}}).layer_widths()
    assert [layer.num_attention_heads for layer in alone] == [6, 3, 6, 6]
    # The floor is no limit for what is fixed.
    assert channels(table(mha=0, fixed={"mlp": {0: 1}}))[0] == 1
    with pytest.raises(TransActError, match="set by hand leave too little"):
        table(mha=0, mlp=0.9, fixed={"mlp": {0: 40}}).layer_widths()


def test_laws_that_were_found_before_choose_as_new_ones_do():
    of = table()
    priced = of.priced(losses(of, [1, 5, 1, 0.2]), EVEN)
    laws = {name: module.laws for name, module in priced.modules.items()}
    assert of.with_laws(laws).layer_widths() == priced.layer_widths()


def test_own_widths_count_as_the_uniform_cut_that_loses_as_much():
    laws = {
        name: [LossLaw(factor, 1.2) for factor in (1.0, 2.0, 4.0, 8.0)] for name in ("mha", "mlp")
    }
    uniform = {"mha": [24] * 4, "mlp": [30] * 4}
    found = equal_uniform_errors(DAMAGE, laws, uniform)
    assert found["mha"] == pytest.approx(DAMAGE.mha.at([24])[0])
    assert found["mlp"] == pytest.approx(DAMAGE.mlp.at([30])[0])
    whole = equal_uniform_errors(DAMAGE, laws, {"mha": [48] * 4, "mlp": [40] * 4})
    assert whole == {"mha": 0, "mlp": 0}
    # Where the dear layers keep more, the sum falls: the first uniform width that loses less
    # than that is found by a loop.
    own = {"mha": [24, 48, 48, 48], "mlp": [10, 28, 34, 40]}
    found = equal_uniform_errors(DAMAGE, laws, own)

    def lost(kept: list[int]) -> float:
        errors = [float((1 - width / 40) ** 1.5) for width in kept]
        return sum(
            law.scale * error**law.exponent for law, error in zip(laws["mlp"], errors, strict=True)
        )

    wider = next(width for width in range(1, 41) if lost([width] * 4) <= lost(own["mlp"]))
    assert DAMAGE.mlp.at([wider])[0] <= found["mlp"] <= DAMAGE.mlp.at([wider - 1])[0]
    assert found["mha"] == pytest.approx(DAMAGE.mha.at([24])[0] / 15, rel=1e-6)
