from dataclasses import replace

import pytest

from transact_core.models.architecture import Architecture
from transact_core.planning.duration import (
    Feed,
    cut_flops,
    damage_flops,
    evaluation_flops,
    pass_flops,
    pricing_flops,
    trial_flops,
)

SHAPE = Architecture(576, 1536, 30, 9, 3, 64, 49152, True, False, False)
CALIBRATION, EVALUATION = Feed(8192, 512), Feed(4096, 512)


def test_a_pass_does_two_flops_for_each_weight_and_token():
    weights = SHAPE.num_hidden_layers * SHAPE.layer_tensors(0)["mlp.up_proj.weight"][0]
    assert pass_flops(SHAPE, EVALUATION) > 2 * 4096 * weights * SHAPE.hidden_size
    head = 2 * 4096 * SHAPE.vocab_size * SHAPE.hidden_size
    assert evaluation_flops(SHAPE, EVALUATION) == pass_flops(SHAPE, EVALUATION) + head


def test_what_takes_longer_is_estimated_to_take_longer():
    cut = replace(SHAPE, num_attention_heads=6, intermediate_size=1075)
    bare, bias, least_squares = (
        cut_flops(SHAPE, cut, recovery, CALIBRATION, EVALUATION)
        for recovery in ("none", "bias", "least-squares")
    )
    assert bare == evaluation_flops(cut, EVALUATION) < evaluation_flops(SHAPE, EVALUATION)
    assert bare < bias < least_squares
    # Nothing is repaired where nothing is cut.
    dense = cut_flops(SHAPE, SHAPE, "least-squares", CALIBRATION, EVALUATION)
    assert dense == evaluation_flops(SHAPE, EVALUATION)


def test_the_damage_of_a_wide_model_is_in_its_factorisations():
    """On a core that evaluates a 7B at 50 GFLOP/s it takes hours, not minutes."""
    large = Architecture(4096, 11_008, 32, 32, 32, 128, 32_000, False, False, False)
    factorisations = 32 * 12 * 11_008**3 / 3
    assert damage_flops(large, CALIBRATION) > factorisations
    assert damage_flops(large, CALIBRATION) / 50e9 > 2 * 3600
    assert damage_flops(SHAPE, CALIBRATION) / 50e9 == pytest.approx(300, rel=0.5)


def test_pricing_runs_half_a_pass_behind_each_layer_and_more_for_repairs():
    held_out = Feed(1536, 256)
    bare, repaired = (
        pricing_flops(SHAPE, recovery, CALIBRATION, held_out)
        for recovery in ("none", "least-squares")
    )
    # Two modules at two levels in each of 30 layers, behind which runs half a pass.
    assert bare > 30 * 2 * 2 * pass_flops(SHAPE, held_out) / 2
    assert bare < repaired < 3 * bare
    cut = replace(SHAPE, intermediate_size=1075)
    trial = trial_flops(SHAPE, cut, "least-squares", CALIBRATION, held_out)
    whole = cut_flops(SHAPE, cut, "least-squares", CALIBRATION, EVALUATION)
    assert evaluation_flops(SHAPE, held_out) < trial < whole + 5 * evaluation_flops(SHAPE, held_out)
