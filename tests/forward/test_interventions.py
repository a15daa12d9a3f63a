import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import bench_of, same_weights, snapshot
from transact_core.base.errors import Cancelled, TransActError
from transact_core.data.windows import Windows
from transact_core.experiments.head_probe import attention_pattern, sample, without_head
from transact_core.experiments.premise import (
    DISTURBANCES,
    NOISE,
    ZERO,
    ZERO_WEAKEST,
    disturb,
    disturb_all_layers,
    disturb_layer_by_layer,
)
from transact_core.forward.interventions import evaluate_changed
from transact_core.forward.perplexity import evaluate
from transact_core.forward.waists import SITES


def by_hooks(model, windows, changes):
    """The same changes, hooked into transformers' own forward pass."""
    handles = []
    for (site, number), change in changes.items():
        decoder = model.model.layers[number]
        place = {
            "mha": decoder.self_attn.o_proj,
            "mlp": decoder.mlp.down_proj,
            "residual": decoder,
        }[site]
        handles.append(
            place.register_forward_pre_hook(
                lambda _, inputs, change=change: (change(inputs[0]), *inputs[1:])
            )
        )
    try:
        return evaluate(model, windows)
    finally:
        for handle in handles:
            handle.remove()


def squashed(activation):
    return activation.tanh() + 0.1


@pytest.mark.parametrize("site", SITES)
def test_changed_losses_are_those_of_a_hooked_model(model, windows, site):
    before = snapshot(model)
    for layers in ([1], range(3)):
        changes = {(site, layer): squashed for layer in layers}
        changed = evaluate_changed(model, windows[1], changes)
        torch.testing.assert_close(
            changed.nll, by_hooks(model, windows[1], changes).nll, rtol=1e-3, atol=1e-3
        )
        assert not torch.allclose(changed.nll, evaluate(model, windows[1]).nll, atol=1e-2)
    assert same_weights(model, before)
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_nothing_changed_is_the_dense_model(model, windows):
    unchanged = evaluate_changed(model, windows[1], {})
    torch.testing.assert_close(unchanged.nll, evaluate(model, windows[1]).nll, rtol=1e-4, atol=1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strength=st.floats(0, 1), layer=st.integers(0, 2), site=st.sampled_from(SITES))
def test_disturbances_are_as_strong_as_asked(gqa_bench, strength, layer, site):
    statistics = gqa_bench.statistics()
    energies = getattr(statistics, site).sum_of_squares[layer]
    torch.manual_seed(0)
    activation = torch.randn(2, 200, len(energies)) * torch.rand(2, 200, 1)
    before = activation.clone()

    noise = disturb(site, layer, NOISE, strength, statistics)(activation) - activation
    relative = noise.norm(dim=-1) / activation.norm(dim=-1)
    assert relative.mean().item() == pytest.approx(strength, rel=0.05, abs=1e-6)

    for disturbance in (ZERO, ZERO_WEAKEST):
        zeroed = disturb(site, layer, disturbance, strength, statistics)(activation)
        gone = (zeroed == 0).all(dim=0).all(dim=0)
        assert gone.sum().item() == round(strength * len(energies))
        assert torch.equal(zeroed[..., ~gone], activation[..., ~gone])
    # Of the last disturbance, which zeroes the weakest.
    if 0 < gone.sum() < len(energies):
        assert energies[gone].max() <= energies[~gone].min()
    assert torch.equal(activation, before)


def test_what_is_drawn_depends_on_the_seed_the_site_and_the_layer_alone(gqa_bench):
    statistics = gqa_bench.statistics()
    ones = torch.ones(1, 4, 48)

    def drawn(site="residual", layer=0, strength=0.5, seed=0, disturbance=NOISE):
        return disturb(site, layer, disturbance, strength, statistics, seed)(ones) - ones

    assert torch.equal(drawn(), drawn())
    torch.testing.assert_close(drawn(strength=1.0), 2 * drawn())
    others = (drawn(site="mha"), drawn(layer=1), drawn(seed=1))
    assert not any(torch.equal(drawn(), other) for other in others)
    small, large = (drawn(disturbance=ZERO, strength=each) for each in (0.25, 0.5))
    assert torch.equal(large.minimum(small), large)


def test_one_layer_at_a_time_is_measured_as_if_each_were_run_alone(gqa_bench):
    reports = []
    measured = list(
        disturb_layer_by_layer(
            gqa_bench, NOISE, 0.5, [2, 0], 3, lambda *report: reports.append(report)
        )
    )
    assert [(each.layer, each.site) for each in measured] == [
        (layer, site) for layer in (0, 2) for site in SITES
    ]
    few = Windows("builtin", "", gqa_bench.evaluation.ids[:3])
    dense = gqa_bench.dense().nll[:3]
    for each in measured:
        change = disturb(each.site, each.layer, NOISE, 0.5, gqa_bench.statistics())
        alone = evaluate_changed(gqa_bench.loaded.model, few, {(each.site, each.layer): change})
        torch.testing.assert_close(each.evaluation.nll, alone.nll, rtol=1e-4, atol=1e-4)
        expected = (each.evaluation.nll - dense).double().mean().item()
        assert each.delta_nll == pytest.approx(expected)
    counts = [report[1:] for report in reports if report[0] == "Disturbing activations"]
    assert counts[-1] == (12, 12)
    assert counts == sorted(counts)


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_all_layers_at_once_begin_with_what_is_weakest(gqa_bench, disturbance):
    measured = list(disturb_all_layers(gqa_bench, disturbance, [0.5, 0.0], 2))
    assert [(each.strength, each.site) for each in measured] == [
        (strength, site) for strength in (0.0, 0.5) for site in SITES
    ]
    assert all(abs(each.delta_nll) < 1e-4 for each in measured[:3])
    assert all(abs(each.delta_nll) > 1e-4 for each in measured[3:])


def test_an_experiment_can_be_called_off_and_leaves_the_model_alone(gqa_bench):
    before = snapshot(gqa_bench.loaded.model)

    def progress(stage, done, total):
        if stage == "Disturbing activations" and done == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(disturb_all_layers(gqa_bench, NOISE, [0.5], 2, progress))
    assert same_weights(gqa_bench.loaded.model, before)
    assert not any(each._forward_pre_hooks for each in gqa_bench.loaded.model.modules())


@pytest.mark.parametrize(("disturbance", "strength"), [("fog", 0.1), (NOISE, 1.5), (ZERO, -0.1)])
def test_a_disturbance_that_is_none_is_refused(gqa_bench, disturbance, strength):
    with pytest.raises(TransActError):
        disturb("mha", 0, disturbance, strength, gqa_bench.statistics())


# --- heads -----------------------------------------------------------------------------------


def test_attention_patterns_are_those_of_eager_attention(model, windows):
    ids = windows[1].ids[:1, :20]
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer in range(3):
        pattern = attention_pattern(model, Windows("", "", ids), layer)
        torch.testing.assert_close(pattern, expected[layer][0], rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_users_text_or_the_evaluation_texts_beginning(gqa_bench):
    assert torch.equal(sample(gqa_bench, " ", 7).ids, gqa_bench.evaluation.ids[:1, :7])
    own = sample(gqa_bench, "A while loop.", 5)
    tokenizer = gqa_bench.loaded.tokenizer
    assert own.ids.tolist() == [tokenizer("A while loop.").input_ids[:5]]


def test_the_loss_without_a_head_is_that_of_zero_weights_in_its_place(model, tokenizer, windows):
    bench = bench_of(model, tokenizer, windows)
    shape = bench.loaded.architecture
    before = snapshot(model)
    measured = without_head(bench, 1, 4)
    without = bench_of(model, tokenizer, windows).loaded.model
    weight = without.model.layers[1].self_attn.o_proj.weight
    columns = slice(4 * shape.head_dim, 5 * shape.head_dim)
    kept = weight[:, columns].clone()
    weight[:, columns] = 0
    expected = evaluate(without, windows[1]).nll
    weight[:, columns] = kept
    torch.testing.assert_close(measured.evaluation.nll, expected, rtol=1e-4, atol=1e-4)
    assert measured.delta_nll == pytest.approx(
        (expected - bench.dense().nll).double().mean().item(), abs=1e-4
    )
    assert same_weights(model, before)
