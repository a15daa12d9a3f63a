import errno
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import same_weights, snapshot
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Choices, compress
from transact_core.export.compression import (
    describe_compression,
    parse_compression,
    reproduce_command,
    require_same_model,
    version_warnings,
)
from transact_core.export.folder import compress_to_folder, write_checkpoint
from transact_core.export.runtimes import readings_of_cut
from transact_core.export.writer import CheckpointWriter, older_fields
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, Decision


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
    assert set(report["dense"]) == set(report["pruned"]) == fields
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
    ):
        assert words in command
