import math

import pytest
import torch
from torch.nn import functional

from tests.conftest import make_model, same_weights, snapshot
from transact_core.base.errors import Cancelled, TransActError
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench
from transact_core.forward.statistics import collect
from transact_core.importance.gradients import collect_saliences
from transact_core.importance.scores import (
    IMPORTANCES,
    Evidence,
    Scores,
    head_scores,
    register,
    score,
)
from transact_core.models.architecture import Architecture
from transact_core.pruning.plan import make_plan

NAMES = (
    "activation",
    "activation-weight",
    "fluctuation",
    "taylor",
    "reconstruction",
    "magnitude",
    "random",
)
close = {"rtol": 1e-4, "atol": 1e-12}


@pytest.fixture
def few(windows):
    return Windows(windows[0].source, windows[0].sha256, windows[0].ids[:4])


@pytest.fixture
def evidence(model, few):
    return Evidence(model, few, Architecture.from_config(model.config))


def transitional(model, windows):
    """Every transitional activation, (layers, tokens, width) by module, from hooks."""
    seen = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        for module, projection in (("mha", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            handles.append(
                projection.register_forward_pre_hook(
                    lambda _, inputs, key=(module, number): seen.setdefault(key, []).append(
                        inputs[0][0]
                    )
                )
            )
    for window in windows.ids:
        model.model(window[None])
    for handle in handles:
        handle.remove()
    layers = range(len(model.model.layers))
    return {
        module: torch.stack([torch.cat(seen[module, number]) for number in layers]).double()
        for module in ("mha", "mlp")
    }


def owned(layer, module, channel, shape):
    """(weight, slice, share) of each row and column that goes with a channel."""
    if module == "mlp":
        return [
            (layer.mlp.gate_proj.weight, (channel, slice(None)), 1),
            (layer.mlp.up_proj.weight, (channel, slice(None)), 1),
            (layer.mlp.down_proj.weight, (slice(None), channel), 1),
        ]
    head, dim = divmod(channel, shape.head_dim)
    shared = head // shape.queries_per_group * shape.head_dim + dim
    attention, share = layer.self_attn, 1 / shape.queries_per_group
    return [
        (attention.q_proj.weight, (channel, slice(None)), 1),
        (attention.k_proj.weight, (shared, slice(None)), share),
        (attention.v_proj.weight, (shared, slice(None)), share),
        (attention.o_proj.weight, (slice(None), channel), 1),
    ]


def by_loop(model, shape, value):
    """(layers, width) by module: `value(weight, slice)` summed over what goes with a channel."""
    return {
        module: torch.tensor(
            [
                [
                    sum(share * value(weight, at) for weight, at, share in owned(*place, shape))
                    for place in ((layer, module, channel) for channel in range(width))
                ]
                for layer in model.model.layers
            ],
            dtype=torch.float64,
        )
        for module, width in (("mha", shape.mha_width), ("mlp", shape.intermediate_size))
    }


def assert_scores(scores, mha, mlp, head_dim):
    torch.testing.assert_close(scores.head_channels, mha, **close)
    torch.testing.assert_close(scores.channels, mlp, **close)
    for layer, row in enumerate(mha.tolist()):
        for head in range(len(row) // head_dim):
            mine = row[head * head_dim : (head + 1) * head_dim]
            expected = sum(mine) / head_dim + 10 / head_dim * max(mine)
            assert scores.heads[layer, head].item() == pytest.approx(expected, rel=1e-4)


def test_all_are_registered():
    assert tuple(IMPORTANCES) == NAMES


def test_activation_weight_equals_its_formula(evidence):
    seen, shape = transitional(evidence.model, evidence.windows), evidence.architecture
    expected = {}
    for module, activations in seen.items():
        rows = []
        for number, layer in enumerate(evidence.model.model.layers):
            projection = layer.self_attn.o_proj if module == "mha" else layer.mlp.down_proj
            rows.append(
                [
                    math.sqrt(sum(a * a for a in activations[number, :, j].tolist()))
                    * math.sqrt(sum(w * w for w in projection.weight[:, j].tolist()))
                    for j in range(projection.in_features)
                ]
            )
        expected[module] = torch.tensor(rows, dtype=torch.float64)
    assert_scores(score("activation-weight", evidence), **expected, head_dim=shape.head_dim)


def test_fluctuation_equals_its_formula(evidence):
    seen, shape = transitional(evidence.model, evidence.windows), evidence.architecture
    scores = score("fluctuation", evidence)
    for number, layer in enumerate(evidence.model.model.layers):
        for activations, projection, got in (
            (seen["mha"], layer.self_attn.o_proj, scores.head_channels),
            (seen["mlp"], layer.mlp.down_proj, scores.channels),
        ):
            for j in range(projection.in_features):
                values = activations[number, :, j].tolist()
                mean = sum(values) / len(values)
                variance = sum((a - mean) ** 2 for a in values) / (len(values) - 1)
                column = sum(w * w for w in projection.weight[:, j].tolist())
                assert got[number, j].item() == pytest.approx(variance * column, rel=1e-3)
        for head in range(shape.num_attention_heads):
            mine = scores.head_channels[number, head * shape.head_dim :][: shape.head_dim]
            assert scores.heads[number, head].item() == pytest.approx(
                sum(mine.tolist()) / shape.head_dim
            )


def test_taylor_equals_its_formula(evidence):
    shape, twin = evidence.architecture, make_model(**_kind(evidence.model))
    twin.load_state_dict(evidence.model.state_dict())
    twin.requires_grad_(True)
    for window in evidence.windows.ids:
        logits = twin(window[None]).logits[0]
        for position in range(len(window) - 1):
            nll = -functional.log_softmax(logits[position], dim=-1)[window[position + 1]]
            nll.backward(retain_graph=True)

    def salience(weight, at):
        return (weight[at] * weight.grad[at]).abs().sum().item()

    expected = by_loop(twin, shape, salience)
    assert_scores(score("taylor", evidence), **expected, head_dim=shape.head_dim)


def _kind(model):
    names = (
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    )
    return {name: getattr(model.config, name) for name in names}


def test_what_a_group_is_worth_counts_every_weight_once(gqa_model, few):
    shape = Architecture.from_config(gqa_model.config)
    squares = score("magnitude", Evidence(gqa_model, few, shape)).head_channels.square()
    attention = gqa_model.model.layers[1].self_attn
    everything = sum(
        projection.weight.double().square().sum()
        for projection in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
        )
    )
    assert squares[1].sum().item() == pytest.approx(everything.item(), rel=1e-5)


def test_magnitude_equals_its_formula(evidence):
    expected = by_loop(
        evidence.model,
        evidence.architecture,
        lambda weight, at: sum(w * w for w in weight[at].tolist()),
    )
    roots = {module: sums.sqrt() for module, sums in expected.items()}
    assert_scores(score("magnitude", evidence), **roots, head_dim=evidence.architecture.head_dim)


def test_random_is_the_seeds(gqa_model, few):
    shape = Architecture.from_config(gqa_model.config)
    one, same, other = (
        score("random", Evidence(gqa_model, few, shape, seed=seed)) for seed in (1, 1, 2)
    )
    for name in ("heads", "head_channels", "channels"):
        scores = getattr(one, name)
        assert torch.equal(scores, getattr(same, name))
        assert not torch.equal(scores, getattr(other, name))
        assert scores.unique().numel() == scores.numel()
        assert scores.min() >= 0
        assert scores.max() < 1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_an_untouched_model(model, few, name):
    before, shape = snapshot(model), Architecture.from_config(model.config)
    one, other = (score(name, Evidence(model, few, shape)) for _ in range(2))
    for part, width in (
        ("heads", shape.num_attention_heads),
        ("head_channels", shape.mha_width),
        ("channels", shape.intermediate_size),
    ):
        scores = getattr(one, part)
        assert torch.equal(scores, getattr(other, part))
        assert scores.shape == (shape.num_hidden_layers, width)
        assert scores.dtype == torch.float64
        assert not scores.requires_grad
        assert scores.isfinite().all()
    assert same_weights(model, before)
    assert all(not weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(
        hooks
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups"])
def test_every_importance_makes_plans(evidence, name, granularity):
    shape = evidence.architecture
    make_plan(shape, score(name, evidence), name, 0.5, 0.3, granularity).check(shape)


def test_only_what_is_looked_at_is_measured(gqa_model, few):
    shape, asked = Architecture.from_config(gqa_model.config), []

    def remember(what, measure):
        asked.append(what.split()[0])
        return measure()

    for name in NAMES:
        score(name, Evidence(gqa_model, few, shape, remember=remember))
    assert asked == ["activations"] * 3 + ["saliences", "elimination"]


def test_each_thing_is_measured_once(gqa_model, few):
    asked = []

    def remember(what, measure):
        asked.append(what)
        return measure()

    evidence = Evidence(
        gqa_model, few, Architecture.from_config(gqa_model.config), remember=remember
    )
    for name in NAMES * 2:
        score(name, evidence)
    assert len(asked) == len(set(asked)) == 3


def test_a_new_importance_is_a_function_and_a_line(gqa_bench):
    @register("first")
    def first(evidence):
        mha = -torch.arange(48.0, dtype=torch.float64).expand(3, 48)
        mlp = -torch.arange(40.0, dtype=torch.float64).expand(3, 40)
        return Scores(head_scores(mha, evidence.architecture.head_dim), mha, mlp)

    try:
        assert gqa_bench.scores("first").channels[0, 1] == -1
        assert "first" in list(IMPORTANCES)
    finally:
        del IMPORTANCES["first"]


def test_an_unknown_importance_is_refused(evidence):
    with pytest.raises(TransActError, match="reconstruction"):
        score("luck", evidence)


@pytest.mark.parametrize("name", ["activation", "taylor", "reconstruction"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("module", ["mha", "mlp"])
def test_activations_that_are_no_numbers_are_refused_by_place(few, name, value, module):
    model = make_model()
    layer = model.model.layers[1]
    projection = layer.self_attn.v_proj if module == "mha" else layer.mlp.up_proj
    with torch.no_grad():
        projection.weight[0, 0] = value
    with pytest.raises(TransActError, match=f"{module} of layer 1 is NaN or infinite"):
        score(name, Evidence(model, few, Architecture.from_config(model.config)))


def test_a_second_process_finds_what_the_first_measured(gqa_bench, monkeypatch):
    first = {name: gqa_bench.scores(name) for name in NAMES}
    for measurement in ("collect", "collect_saliences", "eliminate"):
        monkeypatch.setattr(f"transact_core.importance.scores.{measurement}", None)
    again = Bench(gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation)
    for name in NAMES:
        assert torch.equal(again.scores(name).channels, first[name].channels)
        assert torch.equal(again.scores(name).heads, first[name].heads)


def test_the_benchs_seed_reaches_random(gqa_bench):
    other = Bench(gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation, seed=7)
    assert not torch.equal(other.scores("random").heads, gqa_bench.scores("random").heads)


def test_half_precision_is_scored_like_single(gqa_model, few):
    shape = Architecture.from_config(gqa_model.config)
    half = make_model(**_kind(gqa_model)).bfloat16()
    for name in NAMES:
        one, other = (score(name, Evidence(each, few, shape)) for each in (gqa_model, half))
        both = torch.stack([one.channels.flatten(), other.channels.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9


def test_statistics_are_those_of_the_activations_module(gqa_bench):
    alone = collect(gqa_bench.loaded.model, gqa_bench.calibration)
    assert torch.equal(gqa_bench.statistics().mlp.norm, alone.mlp.norm)


def test_a_gradient_pass_never_shows_in_the_model(gqa_model, few):
    own = {name: id(weight) for name, weight in gqa_model.named_parameters()}
    seen = []

    def look(*_):
        seen.append({name: id(weight) for name, weight in gqa_model.named_parameters()} == own)

    shape = Architecture.from_config(gqa_model.config)
    score("taylor", Evidence(gqa_model, few, shape, progress=look))
    assert len(seen) == 2 * shape.num_hidden_layers + 1
    assert all(seen)


def test_the_logits_of_a_long_window_are_made_in_pieces(gqa_model, few, monkeypatch):
    shape = Architecture.from_config(gqa_model.config)
    rows = []
    gqa_model.lm_head.register_forward_hook(lambda *given: rows.append(given[-1].shape[-2]))
    whole = collect_saliences(gqa_model, few, shape)
    assert set(rows) == {few.sequence_length}
    rows.clear()
    logits = 5 * shape.vocab_size + 1
    monkeypatch.setattr("transact_core.forward.perplexity.LOGITS_AT_ONCE", logits)
    pieces = collect_saliences(gqa_model, few, shape)
    assert max(rows) == 5
    assert sum(rows) == len(few) * few.sequence_length
    for module, saliences in whole.items():
        torch.testing.assert_close(pieces[module], saliences, rtol=1e-4, atol=1e-6)


def test_progress_can_stop_every_measurement(gqa_model, few):
    def stop(stage, done, total):
        if done == 1 or done == total:
            raise Cancelled

    shape = Architecture.from_config(gqa_model.config)
    for name in ("activation", "taylor", "reconstruction"):
        with pytest.raises(Cancelled):
            score(name, Evidence(gqa_model, few, shape, progress=stop))
