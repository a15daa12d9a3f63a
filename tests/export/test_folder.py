import errno
import json
import os
import re
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import FEW_KINDS, bench_of, make_model, same_weights, snapshot
from tests.pruning.test_plan import uneven
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Choices, compress
from transact_core.export.compression import (
    Compression,
    describe_compression,
    parse_compression,
    reproduce_command,
    require_same_model,
    version_warnings,
)
from transact_core.export.folder import compress_to_folder, write_checkpoint
from transact_core.export.runtimes import block_advice, readings_of_cut
from transact_core.forward.perplexity import evaluate
from transact_core.importance.rotary_pairs import PairEffects, drop_order
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_writer import CheckpointWriter, older_fields
from transact_core.models.load import load_model
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, Decision, PruningPlan, make_plan


@pytest.fixture
def cut(gqa_bench):
    plan = gqa_bench.plan(0.5, 0.3, Choices())
    model, measurement = compress(gqa_bench, plan, "least-squares")
    return model, measurement, describe_compression(gqa_bench, Decision(plan), "least-squares")


def test_the_folder_is_whole_and_stock_loads_it(gqa_bench, cut, tmp_path):
    model, measurement, compression = cut
    dense = snapshot(gqa_bench.loaded.model)
    output = tmp_path / "out"
    write_checkpoint(output, model, gqa_bench, measurement, compression)
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert names | {"compression.json", "report.json", "README.md"} <= set(os.listdir(output))
    assert same_weights(AutoModelForCausalLM.from_pretrained(output), snapshot(model))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("fish")["input_ids"] == gqa_bench.loaded.tokenizer("fish")["input_ids"]
    assert parse_compression((output / "compression.json").read_text()) == compression
    others = readings_of_cut(
        compression.plan, gqa_bench.loaded.architecture, gqa_bench.loaded.model.config
    )
    card = (output / "README.md").read_text()
    assert all(f"- {each.sentence}\n" in card for each in others)
    assert same_weights(gqa_bench.loaded.model, dense)

    report = json.loads((output / "report.json").read_text())
    assert set(report) == {"dense", "pruned", "evaluation"}
    fields = {
        "parameters",
        "perplexity",
        "mha_width",
        "mlp_width",
        "kv_bytes_per_token",
        "flops_per_token",
        "context_length",
        "weight_bytes",
    }
    assert set(report["dense"]) == fields
    assert set(report["pruned"]) == fields | {"model_class"}
    assert report["pruned"]["model_class"] == "LlamaForCausalLM"
    assert report["pruned"]["perplexity"] == measurement.perplexity
    assert report["dense"]["perplexity"] == gqa_bench.dense().perplexity
    assert report["pruned"]["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert report["evaluation"] == {
        "source": "builtin",
        "sha256": gqa_bench.evaluation.sha256,
        "tokens": 256,
        "scored_tokens": 8 * 31,
        "sequence_length": 32,
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_stored_as_asked_and_measured_as_stored(gqa_bench, tmp_path, dtype):
    gqa_bench.save_dtype = dtype
    plan = gqa_bench.plan(0.5, 0.3, Choices())
    model, measurement = compress(gqa_bench, plan, "none")
    compression = describe_compression(gqa_bench, Decision(plan), "none")
    write_checkpoint(tmp_path / "out", model, gqa_bench, measurement, compression)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert measurement.footprint.weight_bytes == sum(each.nbytes for each in stored.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert same_weights(again, snapshot(model))


@pytest.mark.parametrize("model", FEW_KINDS, indirect=True)
@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layer_by_layer_gives_the_same_folder(bench, tmp_path, granularity, recovery):
    plan = bench.plan(0.5, 0.3, Choices(granularity=granularity))
    compression = describe_compression(bench, Decision(plan), recovery)
    model, measurement = compress(bench, plan, recovery)
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    write_checkpoint(whole, model, bench, measurement, compression)
    before = snapshot(bench.loaded.model)
    dense = bench.loaded.model
    again = compress_to_folder(streamed, bench, compression)
    assert bench.loaded.released
    assert same_weights(dense, before)
    assert sorted(os.listdir(streamed)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        assert (streamed / name).read_bytes() == (whole / name).read_bytes()
    assert again.fits == measurement.fits
    stock = AutoModelForCausalLM.from_pretrained(streamed)
    stock.save_pretrained(tmp_path / "stock")
    for name in ("generation_config.json", "model.safetensors"):
        assert (tmp_path / "stock" / name).read_bytes() == (streamed / name).read_bytes()
    # Beside what stock writes there are only the fields for older versions.
    saved = json.loads((streamed / "config.json").read_text())
    by_stock = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert saved == by_stock | older_fields(by_stock)


def test_large_checkpoints_come_in_shards_that_stock_loads(gqa_model, tmp_path):
    writer = CheckpointWriter(tmp_path, torch.float16, shard_bytes=20_000)
    for name, tensor in gqa_model.state_dict().items():
        writer.add(name, tensor)
    writer.finish(gqa_model)
    names = {name for name in os.listdir(tmp_path) if name.endswith(".safetensors")}
    assert len(names) > 2
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in names)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == names
    stored = [load_file(tmp_path / name) for name in names]
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in stored for tensor in shard.values()
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert same_weights(stock, snapshot(gqa_model.half()))


def test_ratios_of_zero_give_the_dense_weights(gqa_bench):
    plan = gqa_bench.plan(0, 0, Choices())
    model, measurement = compress(gqa_bench, plan, "least-squares")
    assert same_weights(model, snapshot(gqa_bench.loaded.model))
    assert measurement.fits == ()
    assert (measurement.delta_nll, measurement.delta_nll_se) == (0, 0)


def test_a_disk_that_fills_up_leaves_nothing(gqa_bench, cut, tmp_path, monkeypatch):
    def fill_up(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(gqa_bench.loaded.tokenizer), "save_pretrained", fill_up)
    model, measurement, compression = cut
    with pytest.raises(TransActError, match="the disk is full"):
        write_checkpoint(tmp_path / "out", model, gqa_bench, measurement, compression)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_really_fills_up_leaves_nothing(gqa_bench, cut, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("a file system cannot be mounted here")
    try:
        # The check beforehand would refuse at once; the write itself must survive too.
        monkeypatch.setattr("transact_core.export.folder.require_disk_space", lambda *_: None)
        model, measurement, compression = cut
        with pytest.raises(TransActError, match="the disk is full"):
            write_checkpoint(disk / "out", model, gqa_bench, measurement, compression)
        assert os.listdir(disk) == []
    finally:
        os.system(f"umount {disk}")


def test_a_generation_config_that_cannot_be_saved_is_mended(gqa_bench, cut, tmp_path):
    model, measurement, compression = cut
    model.generation_config.temperature = 0.6
    write_checkpoint(tmp_path / "out", model, gqa_bench, measurement, compression)
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (stored["temperature"], stored["do_sample"]) == (0.6, True)


def test_a_compression_round_trips(cut):
    compression = cut[2]
    assert parse_compression(compression.to_json()) == compression
    assert version_warnings(compression) == []
    older = compression.environment.model_copy(update={"packages": {"torch": "1.0"}})
    assert "torch" in version_warnings(compression.model_copy(update={"environment": older}))[0]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("colour",), "blue", "colour: this field is not known"),
        (("plan", "colour"), "blue", "plan.colour: this field is not known"),
        (("plan", "mha_ratio"), 1.0, "plan.mha_ratio"),
        (("plan", "granularity"), "atoms", "plan.granularity"),
        (("plan", "layers", 0, "kept_heads"), [-1], "plan.layers.0.kept_heads.0"),
        (("recovery",), "magic", "recovery"),
        (("schema_version",), 99, "schema_version"),
        (("calibration", "sha256"), "abc", "calibration.sha256"),
        (("environment", "threads"), 0, "environment.threads"),
    ],
)
def test_fields_that_are_unknown_or_wrong_are_refused_by_name(cut, path, value, complaint):
    stored = json.loads(cut[2].to_json())
    inner = stored
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(TransActError, match=complaint):
        parse_compression(json.dumps(stored))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}'])
def test_what_is_no_compression_is_refused(text):
    with pytest.raises(TransActError, match="cannot be used"):
        parse_compression(text)


def test_another_model_is_refused(cut, gqa_bench):
    require_same_model(cut[2], gqa_bench.loaded)
    other = cut[2].model.model_copy(update={"weight_files": {"model.safetensors": "1" * 64}})
    with pytest.raises(TransActError, match="SHA-256 differ"):
        require_same_model(cut[2].model_copy(update={"model": other}), gqa_bench.loaded)


def test_the_command_names_every_choice(cut):
    command = reproduce_command(cut[2])
    for words in (
        "--mha-ratio 0.5",
        "--mlp-ratio 0.3",
        "--granularity query-heads",
        "--recovery least-squares",
        "--calibration-tokens 1024",
        "--evaluation-tokens 256",
        "--sequence-length 32",
        "--save-dtype float32",
        "--seed 0",
        "--steps 1",
        # Without these a machine with a GPU would compute there, and in bfloat16.
        "--device cpu",
        "--dtype float32",
        "--multiple-of 1",
        "--head-dim-multiple-of 1",
    ):
        assert words in command


def version_1(compression: Compression, **plan) -> dict:
    """As version 1 would have written it."""
    stored = json.loads(compression.to_json())
    del stored["plan"]["head_dim_multiple_of"]
    return stored | {"schema_version": 1, "plan": stored["plan"] | plan}


def test_version_1_is_read_as_what_it_meant(gqa_bench, cut):
    plan, compression = cut[2].plan, cut[2]
    assert parse_compression(json.dumps(version_1(compression))) == compression
    # Its multiple was that of narrower heads too.
    narrow = gqa_bench.plan(0.5, 0.3, Choices(granularity="head-dims", head_dim_multiple_of=4))
    older = version_1(compression, **narrow.model_dump(mode="json", exclude={"multiple_of"}))
    del older["plan"]["head_dim_multiple_of"]
    older["plan"]["multiple_of"] = 4
    read = parse_compression(json.dumps(older)).plan
    assert (read.multiple_of, read.head_dim_multiple_of) == (4, 4)
    assert read.layers == narrow.layers
    assert plan.head_dim_multiple_of == 1


@pytest.fixture
def uneven_plan(gqa_bench) -> PruningPlan:
    return uneven(gqa_bench.plan(0.5, 0.3, Choices()))


def test_layers_of_different_widths_are_saved_and_opened_again(gqa_bench, uneven_plan, tmp_path):
    dense = gqa_bench.loaded
    model, measurement = compress(gqa_bench, uneven_plan, "least-squares")
    decision = Decision(uneven_plan, widths="allocated", keep_layers=(0,))
    compression = describe_compression(gqa_bench, decision, "least-squares")
    assert parse_compression(compression.to_json()) == compression
    assert "--widths allocated --keep-layers 0" in reproduce_command(compression)
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    write_checkpoint(whole, model, gqa_bench, measurement, compression)
    compress_to_folder(streamed, gqa_bench, compression)
    for name in os.listdir(whole):
        assert (streamed / name).read_bytes() == (whole / name).read_bytes()
    left = uneven_plan.applied_to(dense.architecture)
    config = json.loads((whole / "config.json").read_text())
    assert config["intermediate_size"] == left.intermediate_size
    (layer, own), *others = config["per_layer_config"].items()
    assert (layer, others) == ("1", [])
    assert own["intermediate_size"] == 2
    with pytest.raises(Exception, match="per-layer"):
        AutoModelForCausalLM.from_pretrained(whole)
    loaded = load_model(str(whole))
    assert type(loaded.model) is type(model)
    assert loaded.architecture == Architecture.from_model(loaded.model) == left
    assert same_weights(loaded.model, snapshot(model))
    ids = gqa_bench.evaluation.ids[:2]
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    on_disk = load_model(str(whole), offload="always")
    assert on_disk.architecture == left
    assert evaluate(on_disk.model, gqa_bench.evaluation).perplexity == measurement.perplexity
    report = json.loads((whole / "report.json").read_text())
    assert [each["intermediate_size"] for each in report["pruned"]["layers"]] == [28, 2, 28]
    card = (whole / "README.md").read_text()
    assert "Stock transformers 5.23 does not load it by itself" in card
    assert "| 1 | " in card
    assert "widths `allocated`, layers 0 kept whole" in card
    assert "AutoModelForCausalLM" not in card


def test_a_model_of_different_widths_is_not_cut_again(gqa_bench, uneven_plan, tokenizer, windows):
    model, _ = compress(gqa_bench, uneven_plan, "none")
    again = bench_of(model, tokenizer, windows)
    again.loaded = replace(again.loaded, architecture=Architecture.from_model(model))
    with pytest.raises(TransActError, match="cut the dense model that it was made of"):
        again.plan(0.5, 0.3, Choices())


def test_the_dense_weights_are_gone_when_the_result_is_measured(
    tokenizer, windows, tmp_path, monkeypatch
):
    """Beside the dense weights of a 7B, 13 GB, there was no room for what was made of them."""
    bench = bench_of(make_model(num_key_value_heads=3), tokenizer, windows)
    watched = [weakref.ref(weight) for weight in bench.loaded.model.parameters()]
    plan = bench.plan(0.5, 0.3, Choices())
    compression = describe_compression(bench, Decision(plan), "least-squares")
    bench.dense()
    alive = []

    def watching(*given, **named):
        alive.append(sum(weight() is not None for weight in watched))
        return evaluate(*given, **named)

    monkeypatch.setattr("transact_core.experiments.bench.evaluate", watching)
    assert all(weight() is not None for weight in watched)
    compress_to_folder(tmp_path / "out", bench, compression)
    assert alive == [0]


def test_the_card_says_which_multiple_a_block_quantisation_takes(gqa_bench, cut, tmp_path):
    model, measurement, compression = cut
    assert compression.plan.intermediate_size == 28
    advice = block_advice(compression.plan, gqa_bench.loaded.architecture)
    assert "The MLP width 28 is no multiple of 32" in advice
    assert "`--multiple-of 32` (32 channels)" in advice
    assert "256" not in advice  # 256 channels are more than there are
    write_checkpoint(tmp_path / "out", model, gqa_bench, measurement, compression)
    assert f"- {advice}\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def llama_3_pairs():
    """Random effects of the rotary pairs of one layer; ordering 64 pairs takes seconds."""
    inv_freq = torch.rand(64, dtype=torch.float64)
    effects = torch.rand(1, 8, 64, dtype=torch.float64)
    return PairEffects(effects, drop_order(effects, inv_freq), inv_freq)


@pytest.mark.parametrize(
    ("ratios", "choices", "words"),
    [
        ((0.25, 0.3), Choices(), ["--multiple-of 32` (10,048 channels)", "256` (9,984 channels,"]),
        ((0.25, 0.3), Choices(multiple_of=32), []),
        ((0.25, 0.0), Choices(), []),
        ((0.3, 0.0), Choices(granularity="head-dims"), []),
    ],
)
def test_advice_on_llama_3(llama_3_pairs, ratios, choices, words):
    shape = Architecture(4096, 14336, 1, 32, 8, 128, 10, False, False, False)
    scores = Scores(torch.rand(1, 32), torch.rand(1, 4096), torch.rand(1, 14336))
    plan = make_plan(
        shape,
        scores,
        "activation",
        *ratios,
        choices.granularity,
        choices.multiple_of,
        llama_3_pairs,
    )
    advice = block_advice(plan, shape)
    assert all(word in advice for word in words) if words else advice is None


def test_advice_on_narrower_heads(tokenizer, windows):
    bench = bench_of(make_model(head_dim=32), tokenizer, windows)
    plan = bench.plan(0.4, 0, Choices(granularity="head-dims"))
    advice = block_advice(plan, bench.loaded.architecture)
    assert "attention width 120 is no multiple of 32" in advice
    assert "`--head-dim-multiple-of 16`" in advice


def test_no_multiple_is_advised_at_which_nothing_is_cut(tokenizer, windows):
    """At a multiple of 32 the heads keep all 8 dimensions, and the MLP all 64 channels."""
    dense = make_model(num_attention_heads=3, num_key_value_heads=3, intermediate_size=64)
    bench = bench_of(dense, tokenizer, windows)
    plan = bench.plan(0.25, 0.1, Choices(granularity="head-dims"))
    advice = block_advice(plan, bench.loaded.architecture)
    assert "attention width 18 is no multiple of 32" in advice
    assert "MLP width 58 is no multiple of 32" in advice
    assert "Choose" not in advice
