"""Members of the families that are right in an unusual way, or not right at all."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models.families.made import make_member
from transact_core.base.errors import TransActError
from transact_core.models.families.table import FAMILIES
from transact_core.models.load import load_model

IDS = torch.arange(3, 27)[None]
KINDS = {
    "a mixture of experts": "mixtral qwen3_moe gpt_oss olmoe deepseek_v3 deepseek_v32 glm4_moe",
    "a hybrid": "jamba qwen3_next bamba falcon_h1 lfm2 nemotron_h recurrent_gemma rwkv mamba2 xlstm",
    "a multimodal model": "gemma3 llama4 mllama phi4_multimodal moshi",
    "a model of an encoder and a decoder": "bart whisper",
}
"""What some types of models must be called, by the words."""


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


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_type_of_model_is_supported_or_refused_in_a_sentence(model_type, tmp_path):
    """All that transformers has a causal language model for, as it describes them itself."""
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    raw = {"model_type": model_type, "architectures": [named]}
    try:
        raw |= CONFIG_MAPPING[model_type]().to_dict() | raw
    except StrictDataclassClassValidationError:
        # One type refuses its own defaults; what is left of it has its name alone.
        assert model_type == "gemma4_assistant"
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    with pytest.raises(TransActError) as refused:
        load_model(str(tmp_path))
    sentence = str(refused.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    if model_type in FAMILIES:
        # Its description is read; this folder has nothing else.
        assert sentence == f"{tmp_path} holds no weights: there is no model.safetensors."
        return
    # Some bring configurations alone, for LLaMA's class.
    named = f"model of the type {model_type}" if named == "LlamaForCausalLM" else named
    assert f" {named}" in sentence
    assert "only dense causal language models of" in sentence
    called = [words for words in KINDS if f"which is {words}" in sentence]
    wanted = [words for words, members in KINDS.items() if model_type in members.split()]
    assert called == wanted or not wanted
    if model_type == "olmo2":
        assert "normalises the queries and keys of all heads together" in sentence
