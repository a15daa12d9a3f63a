"""Exported checkpoints in runtimes other than the transformers that the app itself uses.

`make test` installs them, locked by hash, in folders of their own: llama.cpp, its converter and
CTranslate2 in .venv/runtimes, transformers 4.57 in .venv/transformers-4. Where one is missing, its
tests fail in CI and are skipped elsewhere. Each runtime runs in one process of its own, which is
asked about all models at once (the scripts are in tests/trust/runtimes).

Each is held to what `transact_core.export.runtimes` says of it, misreadings too: a version of it
that reads more, or less, is noticed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer

from tests.conftest import VOCAB_SIZE, bench_of, make_model, make_tokenizer, windows_for
from tests.models.families.made import make_member
from tests.trust.installed import runtime_folder
from tests.trust.runtimes.in_transformers import answer as answer_of_stock
from transact_core.cli import main
from transact_core.data.corpus import read_corpus
from transact_core.experiments.bench import Choices
from transact_core.export.compression import describe_compression
from transact_core.export.folder import compress_to_folder
from transact_core.export.runtimes import CTRANSLATE2, LLAMA_CPP, readings
from transact_core.pruning.plan import Decision

SCRIPTS = Path(__file__).parent / "runtimes"
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
OTHER_BASE = {"rope_type": "default", "rope_theta": 500_000.0}
"""Not 10,000, which is what a reader takes that does not find the base."""
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
PROMPTS = [" ".join(WORDS.split()[:count]) for count in range(3, len(WORDS.split()) + 1, 3)]
"""Of growing length, as texts."""
SENTENCEPIECE_TOKENS = 400
WITH_FACTORS = "head-dims, with their factors written into the file"
ROTATED = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
"""As in every released SmolLM3."""
GEMMA = {"vocab_size": VOCAB_SIZE, "query_pre_attn_scalar": 8, "final_logit_softcapping": None}
"""As in the released Gemma 3 of text alone: as many rows as tokens, which llama.cpp's converter counts
by the tokenizer, the scale of head_dim, and logits as they are."""
RELEASED = GEMMA | {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}
"""With every sixth layer seeing all tokens, as there."""
OTHER_SCALE = {"query_pre_attn_scalar": 3, "sliding_window": 200}
"""And a window that is longer than the texts."""
QWEN_TOKENS = 8
"""Rows for the tokens that transformers adds to the tests' tokenizer where it is a Qwen's."""
CUTS = {
    "MLP alone": ("query-heads", 0.0, "least-squares", {}),
    "query-heads": ("query-heads", 0.5, "least-squares", {"num_attention_heads": 8, "head_dim": 8}),
    "query-heads down to the KV heads": ("query-heads", 0.5, "least-squares", {}),
    "kv-groups": ("kv-groups", 0.5, "least-squares", {}),
    "kv-groups of one head": ("kv-groups", 0.5, "least-squares", {"num_key_value_heads": 4}),
    "head-dims": ("head-dims", 0.25, "least-squares", {}),
    "biases": ("query-heads", 0.0, "bias", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("query-heads", 0.0, "least-squares", {"tie_word_embeddings": True}),
    "a wider waist": ("query-heads", 0.0, "least-squares", {"head_dim": 32}),
    "another rotary base": (
        "query-heads",
        0.0,
        "least-squares",
        {"rope_parameters": OTHER_BASE},
    ),
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
    **{
        f"{member}, {granularity} {ratio:g}{', ' if note else ''}{note}": (
            granularity,
            ratio,
            "least-squares",
            {"member": member, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
            | changes,
        )
        for member, granularity, ratio, note, changes in (
            ("mistral", "kv-groups", 0.25, "", {}),
            ("mistral, sliding", "query-heads", 0.0, "", {}),
            ("qwen2", "query-heads", 0.0, "tied", {"tie_word_embeddings": True}),
            ("qwen2", "kv-groups", 0.5, "", {}),
            ("qwen2, half sliding", "query-heads", 0.0, "", {}),
            ("qwen3", "kv-groups", 0.5, "", {}),
            ("qwen3", "query-heads", 0.5, "tied", {"tie_word_embeddings": True}),
            ("smollm3", "kv-groups", 0.5, "", ROTATED),
            ("smollm3", "query-heads", 0.0, "others rotate", {}),
            ("granite", "query-heads", 0.0, "", {}),
            ("granite", "kv-groups", 0.5, "", {}),
            ("gemma3", "kv-groups", 0.5, "", RELEASED),
            ("gemma3", "query-heads", 0.0, "other layers slide", GEMMA),
            (
                "gemma3",
                "query-heads",
                0.0,
                "another scale",
                RELEASED | OTHER_SCALE,
            ),
        )
    },
}


def made(tokenizer, member: str = "", **changes):
    """A small model, of LLaMA where no member of the families is named."""
    if not member:
        return make_model(**SHAPE | changes)
    # As Mistral's own tokenizers have.
    tokenizer.unk_token = "<s>"
    return make_member(member, **SHAPE | {"vocab_size": VOCAB_SIZE + QWEN_TOKENS} | changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of each cut, by its name."""
    place = tmp_path_factory.mktemp("exported")
    for name, (granularity, ratio, recovery, changes) in CUTS.items():
        tokenizer = make_tokenizer()
        windows = windows_for(tokenizer)
        bench = bench_of(made(tokenizer, **changes), tokenizer, windows)
        plan = bench.plan(ratio, 0.3, Choices(granularity=granularity, recovery=recovery))
        compress_to_folder(
            place / name, bench, describe_compression(bench, Decision(plan), recovery)
        )
    return place


@pytest.fixture(scope="module")
def stock(exported) -> dict[str, dict]:
    """What the transformers of .venv makes of each folder, by its name."""
    return {cut: answer_of_stock(str(exported / cut), PROMPTS) for cut in CUTS}


def ask(runtime: str, requests: dict[str, dict], place: Path) -> dict[str, dict]:
    """The answers of a runtime in a process of its own, by the name of the request."""
    folder = runtime_folder(runtime)
    place.mkdir()
    asked, answered = place / "requests.json", place / "answers.json"
    asked.write_text(json.dumps(requests))
    done = subprocess.run(
        [sys.executable, SCRIPTS / f"in_{runtime}.py", asked, answered],
        # Before .venv's own packages, which have other versions of some.
        env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answered.read_text())


def said_of(folder) -> dict[str, str]:
    """What is said of a checkpoint, by runtime."""
    config = AutoConfig.from_pretrained(folder)
    unknown = AutoTokenizer.from_pretrained(folder).unk_token is not None
    said = readings(config, unknown)
    return {reading.runtime: reading.outcome for reading in said}


@pytest.fixture(scope="module")
def in_ctranslate2(exported, stock, tmp_path_factory) -> dict[str, dict]:
    requests = {}
    for cut in CUTS:
        tokenizer = AutoTokenizer.from_pretrained(exported / cut)
        tokens = tokenizer.convert_ids_to_tokens(stock[cut]["ids"][-1])
        requests[cut] = {"folder": str(exported / cut), "tokens": tokens}
    return ask("ctranslate2", requests, tmp_path_factory.mktemp("asked") / "ctranslate2")


@pytest.mark.parametrize("cut", CUTS)
def test_ctranslate2_reads_what_is_said(exported, stock, in_ctranslate2, cut):
    outcome, answer = said_of(exported / cut)[CTRANSLATE2], in_ctranslate2[cut]
    if outcome == "refused":
        refusals = (
            "axis",
            "required model attributes",
            "not yet implemented",
            "must be string, but is null",
            "No conversion is registered",
            "buffer to copy",
        )
        assert any(refusal in answer.get("error", "") for refusal in refusals), answer.keys()
        return
    assert "error" not in answer, answer["error"]
    found = np.array(answer["log_probabilities"])
    difference = np.abs(found - np.array(stock[cut]["log_probabilities"][-1])).max()
    assert difference < 1e-4 if outcome == "same" else difference > 0.01


@pytest.fixture(scope="module")
def in_llama_cpp(exported, tmp_path_factory) -> dict[str, dict]:
    requests = {cut: {"folder": str(exported / cut), "prompts": PROMPTS} for cut in CUTS}
    requests[WITH_FACTORS] = requests["head-dims"] | {"with_factors": True}
    return ask("llama_cpp", requests, tmp_path_factory.mktemp("asked") / "llama_cpp")


TIED = 0.02
"""Difference of the best two tokens' log-probabilities below which either may come first:
llama.cpp's logits differ by up to 0.03 with its defaults."""


def same_next_tokens(answer: dict, expected: dict) -> float:
    """The share of prompts, as texts, after which llama.cpp has stock transformers' next token.

    Prompts whose best two tokens are as good as tied are left out.
    """
    assert "error" not in answer, answer["error"]
    assert answer["counts"] == [len(ids) for ids in expected["ids"]], "the text is cut differently"
    pairs = [
        (found, int(np.argmax(log_probabilities[-1])))
        for found, log_probabilities in zip(
            answer["next"], expected["log_probabilities"], strict=True
        )
        if found is not None and np.diff(np.sort(log_probabilities[-1])[-2:]) > TIED
    ]
    assert len(pairs) >= len(PROMPTS) // 2
    return float(np.mean([found == wanted for found, wanted in pairs]))


@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_reads_what_is_said(exported, stock, in_llama_cpp, cut):
    outcome, answer = said_of(exported / cut)[LLAMA_CPP], in_llama_cpp[cut]
    if outcome == "refused":
        assert "Failed to init server" in answer.get("error", "")
        return
    share = same_next_tokens(answer, stock[cut])
    assert share == 1 if outcome == "same" else share < 0.9


def test_llama_cpp_reads_narrower_heads_once_their_factors_are_written(stock, in_llama_cpp):
    assert same_next_tokens(in_llama_cpp[WITH_FACTORS], stock["head-dims"]) == 1


@pytest.fixture(scope="module")
def in_transformers_4(exported, tmp_path_factory) -> dict[str, dict]:
    requests = {cut: {"folder": str(exported / cut), "texts": PROMPTS} for cut in CUTS}
    return ask("transformers", requests, tmp_path_factory.mktemp("asked") / "transformers")


def perplexity(answer: dict) -> float:
    """Of the longest prompt."""
    ids, log_probabilities = answer["ids"][-1], np.array(answer["log_probabilities"][-1])
    return float(np.exp(-log_probabilities[np.arange(len(ids) - 1), ids[1:]].mean()))


@pytest.mark.parametrize("cut", CUTS)
def test_transformers_4_reads_what_transformers_5_reads(stock, in_transformers_4, cut):
    answer, expected = in_transformers_4[cut], stock[cut]
    assert "error" not in answer, answer["error"]
    assert answer["ids"] == expected["ids"]
    assert answer["class"] == expected["class"]
    for found, wanted in zip(
        answer["log_probabilities"], expected["log_probabilities"], strict=True
    ):
        assert np.abs(np.array(found) - np.array(wanted)).max() < 1e-3
    assert perplexity(answer) == pytest.approx(perplexity(expected), rel=1e-3)


@pytest.fixture(scope="module")
def with_sentencepiece(tmp_path_factory):
    """A cut of a checkpoint with a SentencePiece tokenizer, made by the command line."""
    place = tmp_path_factory.mktemp("sentencepiece")
    (place / "text.txt").write_text(read_corpus("builtin").text[:30_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "text.txt"),
        model_prefix=str(place / "tokenizer"),
        model_type="bpe",
        vocab_size=SENTENCEPIECE_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    source = place / "source"
    make_model(
        **SHAPE, vocab_size=SENTENCEPIECE_TOKENS, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ).save_pretrained(source)
    (place / "tokenizer.model").rename(source / "tokenizer.model")
    # As Llama 2's: without a word on the first token, readers differ in whether they add it.
    LlamaTokenizer.from_pretrained(source, legacy=False, add_bos_token=True).save_pretrained(source)
    assert (source / "tokenizer.model").exists()
    texts = [
        *("--calibration", str(place / "text.txt"), "--calibration-tokens", "1024"),
        *("--evaluation", str(place / "text.txt"), "--evaluation-tokens", "256"),
        *("--sequence-length", "32"),
    ]
    ratios = ["--mha-ratio", "0", "--mlp-ratio", "0.3"]
    output = place / "out"
    assert main(["prune", "--model", str(source), *ratios, "--output", str(output), *texts]) == 0
    return output


def test_llama_cpp_cuts_texts_as_the_sentencepiece_tokenizer_does(with_sentencepiece, tmp_path):
    requests = {"out": {"folder": str(with_sentencepiece), "prompts": PROMPTS}}
    answer = ask("llama_cpp", requests, tmp_path / "asked")["out"]
    assert same_next_tokens(answer, answer_of_stock(str(with_sentencepiece), PROMPTS)) == 1


@pytest.fixture(scope="module")
def with_24_heads(tmp_path_factory):
    """Llama-3-8B's 32 heads over 8 groups, cut to 24, which do not divide the hidden size."""
    tokenizer = make_tokenizer()
    model = make_model(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=4,
    )
    bench = bench_of(model, tokenizer, windows_for(tokenizer))
    plan = bench.plan(0.25, 0.3, Choices(granularity="query-heads"))
    output = tmp_path_factory.mktemp("heads") / "out"
    compression = describe_compression(bench, Decision(plan), "least-squares")
    compress_to_folder(output, bench, compression)
    config = AutoConfig.from_pretrained(output)
    assert config.num_attention_heads == 24
    return output


def test_any_number_of_heads_is_read_by_llama_cpp(with_24_heads, tmp_path):
    requests = {"out": {"folder": str(with_24_heads), "prompts": PROMPTS}}
    answer = ask("llama_cpp", requests, tmp_path / "asked")["out"]
    assert same_next_tokens(answer, answer_of_stock(str(with_24_heads), PROMPTS)) == 1


def test_any_number_of_heads_is_read_by_transformers_4(with_24_heads, tmp_path):
    requests = {"out": {"folder": str(with_24_heads), "texts": PROMPTS}}
    answer = ask("transformers", requests, tmp_path / "asked")["out"]
    expected = answer_of_stock(str(with_24_heads), PROMPTS)
    assert answer.get("class") == expected["class"] == "MistralForCausalLM", answer
    assert answer["ids"] == expected["ids"]
    assert perplexity(answer) == pytest.approx(perplexity(expected), rel=1e-3)
