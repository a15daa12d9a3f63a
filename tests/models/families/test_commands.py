"""Every command works on a checkpoint of each family, which stock transformers then loads."""

import json

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.families.made import make_member
from transact_core.cli import main

IDS = torch.arange(3, 27)[None]


@pytest.fixture(params=["mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma3"])
def source(request, tokenizer, tmp_path):
    folder = tmp_path / "source"
    make_member(request.param, tied=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_commands(source, text_file, tmp_path, capsys):
    calibration = ["--calibration", str(text_file), "--calibration-tokens", "256"]
    evaluation = ["--evaluation", str(text_file), "--evaluation-tokens", "64"]
    length = ["--sequence-length", "16"]
    model, out, again = ["--model", str(source)], tmp_path / "out", tmp_path / "again"
    ratios = ["--mha-ratio", "0.34", "--mlp-ratio", "0.4", "--granularity", "kv-groups"]
    texts = [*calibration, *evaluation, *length]
    assert main(["prune", *model, *ratios, "--output", str(out), *texts]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, out))
    assert type(before) is type(after)
    assert after.config.num_attention_heads == 4
    changed = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim"}
    changed |= {"dtype", "_name_or_path"}
    for name, value in before.config.to_dict().items():
        if name not in changed:
            assert after.config.to_dict()[name] == value, name

    assert main(["apply", str(out / "compression.json"), "--output", str(again)]) == 0
    for name in ("model.safetensors", "config.json", "report.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()

    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), *evaluation, *length, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = json.loads((out / "report.json").read_text())
    assert report["pruned"].pop("model_class") == type(after).__name__
    assert found["model"] == report["pruned"]
    assert report["pruned"]["parameters"] == after.num_parameters()

    scores = str(tmp_path / "scores.parquet")
    assert main(["analyze", *model, *calibration, *length, "--output", scores]) == 0
    assert len(pd.read_parquet(scores)) == 3 * (6 + 48 + 40)

    points = str(tmp_path / "points.csv")
    grid = ["--mha-ratio", "0,0.5", "--mlp-ratio", "0.3", "--recovery", "none"]
    assert main(["sweep", *model, *grid, "--output", points, *texts]) == 0
    assert len(pd.read_csv(points)) == 2
