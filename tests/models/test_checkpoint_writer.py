"""Configurations that transformers 5 and transformers 4 read alike."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import make_model
from transact_core.models.checkpoint_writer import CheckpointWriter

THETA = {"rope_theta": 100_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
}
ROPES = {
    "default": {"rope_type": "default"},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "narrowed": LONGROPE | {"original_max_position_embeddings": 256},
    "longrope": LONGROPE | {"original_max_position_embeddings": 64},
}


def written(model, folder) -> dict:
    writer = CheckpointWriter(folder, torch.float32)
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    writer.finish(model)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_parameters_are_written_for_both_versions(tmp_path, kind, capfd):
    model = make_model(rope_parameters=ROPES[kind] | THETA)
    config = written(model, tmp_path)
    assert config["rope_theta"] == 100_000.0
    assert config["rope_parameters"] == model.config.rope_parameters
    assert config["dtype"] == config["torch_dtype"] == "float32"
    if kind == "default":
        assert config["rope_scaling"] is None
    else:
        # Version 4 warns of rope_theta there, and of whole numbers.
        assert config["rope_scaling"] == ROPES[kind]
        assert isinstance(config["rope_scaling"].get("factor"), float)

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(200)[None] % 320
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert "rope" not in capfd.readouterr().err


def test_version_4_finds_the_original_length_of_longrope_beside_it(tmp_path):
    longer = written(make_model(rope_parameters=ROPES["longrope"] | THETA), tmp_path)
    assert longer["original_max_position_embeddings"] == 64
    narrowed = written(make_model(rope_parameters=ROPES["narrowed"] | THETA), tmp_path)
    assert "original_max_position_embeddings" not in narrowed


def test_what_is_read_again_writes_the_same(tmp_path):
    model = make_model(rope_parameters=LLAMA3 | THETA)
    first = written(model, tmp_path)
    model.config = AutoConfig.from_pretrained(tmp_path)
    assert written(model, tmp_path) == first
