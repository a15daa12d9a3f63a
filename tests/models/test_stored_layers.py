"""Layers that are read from disk: the same numbers as those in memory, and few of them at a time."""

import gc
import weakref

import psutil
import pytest
import torch

from tests.conftest import make_model, windows_for
from tests.models.families.made import KINDS, make_member
from transact_core.base.errors import TransActError
from transact_core.data.windows import WindowSpec
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.experiments.decide import decide
from transact_core.forward.generation import generate
from transact_core.forward.layers import layers_of, weights_of
from transact_core.forward.perplexity import evaluate, token_losses
from transact_core.forward.statistics import collect
from transact_core.forward.stream import Stream
from transact_core.importance.scores import IMPORTANCES, Evidence, score
from transact_core.models.load import load_model
from transact_core.models.stored_layers import StoredLayers
from transact_core.planning.damage import kept_first, measure_curves
from transact_core.pruning.plan import GRANULARITIES


def both(folder, tokenizer, model, dtype="float32", device="cpu"):
    """A model, written to a folder, with its layers in memory and with them on disk."""
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    return [
        load_model(str(folder), str(device), dtype, offload=offload)
        for offload in ("never", "always")
    ]


@pytest.fixture
def pair(tmp_path, tokenizer):
    return both(tmp_path / "model", tokenizer, make_model(num_hidden_layers=5))


@pytest.fixture
def alive(monkeypatch):
    """For each time that a layer was read, in how many layers weights were alive just then."""
    read, counts, weights = StoredLayers._read, [], {}

    def counting(self, layer_index):
        tensors = read(self, layer_index)
        weights[len(weights), layer_index] = [weakref.ref(tensor) for tensor in tensors.values()]
        counts.append(
            sum(any(tensor() is not None for tensor in each) for each in weights.values())
        )
        return tensors

    monkeypatch.setattr(StoredLayers, "_read", counting)
    return counts


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_measures_the_same_bits(kind, tmp_path, tokenizer):
    windows = windows_for(tokenizer, calibration_tokens=256, evaluation_tokens=64)
    whole, stored = both(tmp_path / "model", tokenizer, make_member(*KINDS[kind]))
    assert not whole.offloaded
    assert stored.offloaded
    assert whole.model.config.to_json_string() == stored.model.config.to_json_string()
    assert whole.model.generation_config == stored.model.generation_config
    one, other = (collect(each.model, windows[0]).to_tensors() for each in (whole, stored))
    same(one, other)
    assert torch.equal(*(evaluate(each.model, windows[1]).nll for each in (whole, stored)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_importance_and_the_curves_are_the_same(dtype, device, tmp_path, tokenizer):
    windows = windows_for(tokenizer, calibration_tokens=256)[0]
    loaded = both(tmp_path / "model", tokenizer, make_model(num_key_value_heads=3), dtype, device)
    for importance in IMPORTANCES:
        one, other = (
            score(importance, Evidence(each.model, windows, each.architecture)) for each in loaded
        )
        same(vars(one), vars(other))
    orders = kept_first(one, loaded[0].architecture)
    same(*(measure_curves(each.model, windows, orders) for each in loaded))


def benches(pair, windows, monkeypatch, tmp_path):
    """One on each of the two models; nothing is remembered of the other."""
    for loaded in pair:
        monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / f"cache-{loaded.offloaded}"))
        yield Bench(loaded, *windows, save_dtype="bfloat16")


@pytest.mark.parametrize(
    "choices",
    [
        *(Choices(granularity) for granularity in GRANULARITIES),
        Choices(importance="reconstruction", sequential=True),
        Choices(steps=2),
        Choices(recovery="none"),
    ],
    ids=lambda choices: f"{choices.granularity} {choices.recovery} {choices.steps}",
)
def test_a_cut_is_the_same_and_its_layers_are_on_disk_too(
    choices, tmp_path, tokenizer, monkeypatch
):
    windows = windows_for(tokenizer, calibration_tokens=256, evaluation_tokens=64)
    tiny = make_model(num_key_value_heads=3, num_hidden_layers=2)
    pair = both(tmp_path / "model", tokenizer, tiny)
    found, narrowing = [], []
    for bench in benches(pair, windows, monkeypatch, tmp_path):
        plan = decide(bench, 0.34, 0.3, choices).plan
        model, measurement = compress(bench, plan, choices.recovery)
        weights = {name: tensor.clone() for name, tensor in weights_of(model)}
        assert weights.keys() == model.state_dict().keys()
        found.append((plan, weights, measurement))
        if choices.granularity == "head-dims":
            narrowing.append(bench.damage(choices).mha.errors)
    (plan, weights, one), (stored_plan, stored_weights, other) = found
    assert plan == stored_plan
    same(weights, stored_weights)
    assert torch.equal(one.evaluation.nll, other.evaluation.nll)
    assert one.fits == other.fits
    assert not narrowing or torch.equal(*narrowing)
    (left,) = (tmp_path / "cache-True").glob(".cut*")
    del model
    gc.collect()
    assert not left.exists()


def test_at_most_two_layers_have_weights_at_any_time(pair, windows, alive, monkeypatch, tmp_path):
    *_, bench = benches(pair, windows, monkeypatch, tmp_path)
    layers = len(bench.loaded.model.model.layers)
    collect(bench.loaded.model, windows[0])
    evaluate(bench.loaded.model, windows[1])
    assert len(alive) == 2 * layers
    for importance in IMPORTANCES:
        bench.scores(importance)
    compress(bench, bench.plan(0.5, 0.3, Choices()), "least-squares")
    assert max(alive) == 2


def test_a_layer_is_itself_in_a_block_within_a_block_and_empty_afterwards(pair):
    layers = layers_of(pair[1].model)
    with layers.borrow(1) as layer:
        weight = layer.mlp.up_proj.weight
        with layers.borrow(1) as again, layers.borrow(3) as other:
            assert again is layer
            assert not other.mlp.up_proj.weight.is_meta
        assert layer.mlp.up_proj.weight is weight
    assert layer.mlp.up_proj.weight.is_meta
    expected = pair[0].model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, expected)


def test_what_needs_the_whole_model_is_refused_in_a_sentence(pair):
    loaded = pair[1]
    ids = torch.arange(2, 8)
    assert torch.equal(*(token_losses(each.model, ids) for each in pair))
    with pytest.raises(TransActError, match="needs the whole model in memory, and the layers of"):
        list(generate(loaded.model, ids.tolist(), 2))
    with pytest.raises(TransActError, match=r"^Training needs the whole model"):
        loaded.require_whole("Training")


def test_a_file_that_is_gone_is_said(pair, tmp_path):
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(TransActError, match=r"Layer 0 cannot be read from .*model any more"):
        Stream(pair[1].model, windows_for(pair[1].tokenizer)[0]).pass_layer(0)


def test_it_begins_by_itself_where_the_model_does_not_fit(checkpoint, text_file, monkeypatch):
    parameters = make_model(num_key_value_heads=3).num_parameters()
    free = psutil.virtual_memory()._replace(available=int(3.9 * parameters))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    windows = WindowSpec(str(text_file), str(text_file), 512, 128, 32)
    bench = open_bench(BenchSpec(str(checkpoint), "cpu", "float32", windows))
    assert bench.loaded.offloaded
    (notice,) = (notice for notice in bench.notices if "GB of memory on cpu" in notice)
    assert "read from disk one at a time" in notice
    assert "take longer" in notice
    with pytest.raises(TransActError, match="Loading takes about"):
        load_model(str(checkpoint), "cpu", "float32")
    free = free._replace(available=parameters)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(TransActError, match="Loading takes about"):
        open_bench(BenchSpec(str(checkpoint), "cpu", "float32", windows))
