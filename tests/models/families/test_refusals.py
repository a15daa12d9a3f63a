"""Members of the families that are right in an unusual way, or not right at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.families.made import make_member
from transact_core.base.errors import TransActError
from transact_core.models.load import load_model

IDS = torch.arange(3, 27)[None]


@pytest.fixture(params=["mistral", "qwen2", "qwen3", "smollm3", "granite"])
def folder(request, tokenizer, tmp_path):
    make_member(request.param).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_odd_head_dim_is_refused(folder):
    edit(folder, head_dim=7)
    with pytest.raises(TransActError, match="RoPE requires an even rotary dimension"):
        load_model(str(folder))


def test_layers_beyond_the_decoders_are_left_out_and_that_is_said(folder):
    """As some checkpoints keep layers for the prediction of several tokens."""
    stored = load_file(folder / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    extra = {
        name.replace("layers.2", "layers.3"): weight.clone()
        for name, weight in stored.items()
        if "layers.2" in name
    }
    save_file(stored | extra, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(folder))
    name = type(loaded.model).__name__
    assert any(f"tensors that a {name} of its configuration" in each for each in loaded.notices)
    assert torch.equal(loaded.model(IDS).logits, expected)


def test_another_class_of_the_family_is_refused(folder):
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    other = named.replace("ForCausalLM", "ForSequenceClassification")
    edit(folder, architectures=[other])
    with pytest.raises(TransActError, match=f"holds a {other}; only dense causal language models"):
        load_model(str(folder))
