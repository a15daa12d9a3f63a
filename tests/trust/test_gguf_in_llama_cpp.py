"""What the workbench writes as GGUF, stock llama.cpp computes as transformers does.

llama.cpp is the one of the optional package; without it these tests fail in CI and are skipped
elsewhere. The models are tiny and random, in float32, so that losses agree to rounding.
"""

import copy
import os
import signal

import numpy as np
import pytest
import torch

from tests.conftest import bench_of, loaded_from, make_model, windows_for
from tests.models.families.made import make_member
from tests.trust.installed import require_llama_cpp_installed
from tests.trust.test_hostile import read_or_refused
from tests.trust.test_other_runtimes import LINEAR, LLAMA3, OTHER_BASE, SHAPE, YARN
from transact_core.base.errors import Cancelled, TransActError
from transact_core.experiments.bench import Choices
from transact_core.export.gguf import describe_model, plan_file, vocabulary_for, write_file
from transact_core.forward.in_llama_cpp import evaluate_gguf, measure_gguf_latency
from transact_core.forward.perplexity import evaluate
from transact_core.models.architecture import Architecture
from transact_core.models.llama_cpp import running
from transact_core.pruning.surgery import prune

require_llama_cpp_installed()

EIGHT = {"num_attention_heads": 8, "head_dim": 8}
CUTS = {
    "not cut": (None, {}),
    "biases, tied": (
        None,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "query-heads": (("query-heads", 0.5, False), EIGHT),
    "kv-groups": (("kv-groups", 0.5, False), {}),
    "head-dims": (("head-dims", 0.25, False), {}),
    "head-dims of llama3 frequencies": (
        ("head-dims", 0.5, True),
        {"rope_parameters": LLAMA3},
    ),
    "heads that do not divide hidden_size": (("query-heads", 0.25, False), EIGHT),
    "such heads with biases": (("query-heads", 0.25, True), EIGHT),
    "another rotary base": (None, {"rope_parameters": OTHER_BASE}),
    "llama3 frequencies": (None, {"rope_parameters": LLAMA3}),
    "linear frequencies": (None, {"rope_parameters": LINEAR}),
    "yarn frequencies": (None, {"rope_parameters": YARN}),
}


@pytest.fixture(scope="module")
def texts(tokenizer):
    return windows_for(tokenizer, evaluation_tokens=192, sequence_length=96)


def cut_of(model, tokenizer, texts, cut):
    """The model, or what a cut leaves of it, unrepaired."""
    if cut is None:
        return model
    granularity, ratio, with_biases = cut
    bench = bench_of(model, tokenizer, texts)
    plan = bench.plan(ratio, 0.3, Choices(granularity=granularity))
    return prune(model, plan, with_biases)


def written(path, model, tokenizer, chosen="F32", imatrix=None, architecture=None):
    """A GGUF file of a model in memory; returns its plan."""
    architecture = architecture or Architecture.from_model(model)
    vocabulary = vocabulary_for(loaded_from(model, tokenizer))
    description = describe_model(model.config, architecture, vocabulary, "tiny")
    plan = plan_file(description, chosen, None)
    write_file(path, plan, architecture, model.state_dict().__getitem__, threads=1)
    assert path.stat().st_size == plan.bytes
    return plan


def difference(path, model, texts) -> float:
    """The largest difference of a token's loss between both runtimes, in nats."""
    found = evaluate_gguf(path, texts[1], threads=1)
    return float((found.nll - evaluate(model, texts[1]).nll).abs().max())


@pytest.mark.parametrize("case", CUTS)
def test_losses_are_those_of_transformers(case, tokenizer, texts, tmp_path):
    cut, changes = CUTS[case]
    model = cut_of(make_model(**SHAPE | changes), tokenizer, texts, cut)
    written(tmp_path / "x.gguf", model, tokenizer)
    assert difference(tmp_path / "x.gguf", model, texts) < 2e-4


FAMILIES = {
    "mistral": {},
    "qwen2": {"tied": True},
    "qwen3": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "phi3": {},
}
"""What makes a member of each family one that llama.cpp has an architecture for."""


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("member", FAMILIES)
def test_losses_of_other_families_are_those_of_transformers(
    member, is_cut, tokenizer, texts, tmp_path
):
    # llama.cpp takes Phi-3 to have heads as wide as the residual stream.
    cut = ("query-heads", 0.0 if member == "phi3" else 0.5, False) if is_cut else None
    model = make_member(member, grouped=not is_cut, **FAMILIES[member])
    left = cut_of(model, tokenizer, texts, cut)
    written(tmp_path / "x.gguf", left, tokenizer)
    assert difference(tmp_path / "x.gguf", left, texts) < 2e-4


@pytest.mark.parametrize("member", ["qwen2", "granite"])
def test_heads_of_other_families_can_be_narrowed(member, tokenizer, texts, tmp_path):
    model = make_member(member, grouped=False)
    left = cut_of(model, tokenizer, texts, ("head-dims", 0.5, False))
    written(tmp_path / "x.gguf", left, tokenizer)
    assert difference(tmp_path / "x.gguf", left, texts) < 2e-4


@pytest.mark.parametrize(
    ("member", "changes", "cut", "complaint"),
    [
        ("mistral, sliding", {}, None, "sliding_window is 5"),
        ("qwen2, half sliding", {}, None, "sliding_window is 5"),
        ("smollm3", {}, None, r"no_rope_layers is \[1, 0, 1\]"),
        ("qwen3", {"attention_bias": True}, None, "attention_bias is True"),
        ("gemma3", {}, None, "GGUF files of Gemma 3 models are not written"),
        ("qwen3", {"rope_parameters": LLAMA3}, None, "cannot hold rotary frequencies"),
        ("phi3", {}, ("query-heads", 0.5, False), r"as wide as the hidden size \(24 of 48"),
        ("phi3", {"partial_rotary_factor": 0.5}, None, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_an_architecture_cannot_say_is_refused(
    member, changes, cut, complaint, tokenizer, texts, tmp_path
):
    model = make_member(member, grouped=False, **changes)
    with pytest.raises(TransActError, match=complaint):
        written(tmp_path / "x.gguf", cut_of(model, tokenizer, texts, cut), tokenizer)


@pytest.mark.parametrize("kind", ["untied", "tied", "qwen2"])
def test_layers_of_their_own_widths_are_a_deci_model(kind, tokenizer, texts, tmp_path):
    own = {"tie_word_embeddings": kind == "tied", "rope_parameters": LLAMA3}
    model = make_model(**SHAPE | EIGHT | own)
    if kind == "qwen2":
        model = make_member("qwen2", grouped=True, num_attention_heads=6, num_key_value_heads=2)
    bench = bench_of(model, tokenizer, texts)
    plans = [
        bench.plan(mha, mlp, Choices(granularity=granularity))
        for mha, mlp, granularity in (
            (0.5, 0.3, "query-heads"),
            (0.0, 0.6, "query-heads"),
            (0.5, 0.0, "kv-groups"),
        )
    ]
    layers = tuple(plan.layers[index] for index, plan in enumerate(plans))
    plan = plans[0].model_copy(
        update={
            "layers": layers,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "intermediate_size": None,
        }
    )
    cut = prune(model, plan)
    assert not Architecture.from_model(cut).uniform
    written(tmp_path / "x.gguf", cut, tokenizer)
    assert b"deci.attention.head_count" in (tmp_path / "x.gguf").read_bytes()
    assert difference(tmp_path / "x.gguf", cut, texts) < 2e-4


def test_a_wrong_file_is_noticed(tokenizer, texts, tmp_path):
    """Otherwise the tests above would prove nothing."""
    model = make_model(**SHAPE)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.data = (
            other.model.layers[1].self_attn.k_proj.weight.flip(0).clone()
        )
    written(tmp_path / "x.gguf", other, tokenizer)
    assert difference(tmp_path / "x.gguf", model, texts) > 0.01


def test_latency_takes_turns_and_says_what_it_took(tokenizer, texts, tmp_path):
    files = {name: tmp_path / f"{name}.gguf" for name in ("dense", "pruned")}
    for path in files.values():
        written(path, make_model(**SHAPE, num_hidden_layers=2), tokenizer, "F16")
    ids = texts[1].ids.flatten()
    measured = measure_gguf_latency(files, ids, [8, 40], decode=3, repeats=2, threads=1)
    assert [(point.model, point.length) for point in measured.points] == [
        ("dense", 8),
        ("pruned", 8),
        ("dense", 40),
        ("pruned", 40),
    ]
    assert all(min(point.prefill.seconds + point.decode.seconds) > 0 for point in measured.points)
    for name, path in files.items():
        figures = measured.files[name]
        assert figures.file_bytes == path.stat().st_size
        assert figures.threads == 1
        assert figures.load_seconds > 0
        assert figures.peak_bytes is None or figures.peak_bytes > figures.file_bytes


def test_a_cancel_ends_llama_cpp_and_leaves_no_file(tokenizer, texts, tmp_path):
    model = make_model(**SHAPE)
    architecture = Architecture.from_model(model)
    vocabulary = vocabulary_for(loaded_from(model, tokenizer))
    plan = plan_file(describe_model(model.config, architecture, vocabulary, "tiny"), "Q8_0")

    def stop(stage, done, total):
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_file(
            tmp_path / "x.gguf",
            plan,
            architecture,
            model.state_dict().__getitem__,
            progress=stop,
            threads=1,
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(tokenizer, tmp_path):
    model = make_model(**SHAPE)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    for chosen in ("F16", "Q8_0"):
        with pytest.raises(TransActError, match="cannot represent"):
            written(tmp_path / "x.gguf", model, tokenizer, chosen)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_end_in_one_line(tokenizer, texts, tmp_path):
    written(tmp_path / "whole.gguf", make_model(**SHAPE), tokenizer)
    whole = (tmp_path / "whole.gguf").read_bytes()
    generator = np.random.default_rng(0)
    cases = [b"", b"GGUF", whole[:100], whole[: len(whole) // 2], whole[:-64], bytes(len(whole))]
    for _ in range(6):
        changed = bytearray(whole)
        for place in generator.integers(0, 20_000, 12):
            changed[place] = generator.integers(0, 256)
        cases.append(bytes(changed))
    for content in cases:
        (tmp_path / "damaged.gguf").write_bytes(content)
        read_or_refused(lambda: evaluate_gguf(tmp_path / "damaged.gguf", texts[1], threads=1))


def test_hostile_headers_end_in_one_line(tokenizer, texts, tmp_path):
    """Counts, lengths, widths and offsets that no file can have."""
    written(tmp_path / "whole.gguf", make_model(**SHAPE), tokenizer)
    whole = (tmp_path / "whole.gguf").read_bytes()
    huge, negative = (2**62).to_bytes(8, "little"), b"\xff" * 8

    def after(name: bytes, skipped: int, value: bytes) -> bytes:
        place = whole.index(name) + len(name) + skipped
        return whole[:place] + value + whole[place + len(value) :]

    cases = [
        whole[:8] + huge + whole[16:],  # tensors
        whole[:16] + huge + whole[24:],  # entries
        whole[:24] + huge + whole[32:],  # the length of the first key
        after(b"tokenizer.ggml.tokens", 8, huge),  # the length of an array
        after(b"llama.block_count", 4, b"\xff\xff\xff\x7f"),
        after(b"llama.attention.head_count", 4, bytes(4)),
        after(b"llama.rope.dimension_count", 4, b"\xff\xff\xff\x7f"),
        after(b"token_embd.weight", 4, huge),  # rows of a tensor
        after(b"token_embd.weight", 4 + 16 + 4, negative),  # where a tensor begins
        after(b"token_embd.weight", 4 + 16, b"\xff\xff\xff\xff"),  # its type
    ]
    for content in cases:
        assert content != whole
        (tmp_path / "hostile.gguf").write_bytes(content)
        with pytest.raises(TransActError) as refusal:
            evaluate_gguf(tmp_path / "hostile.gguf", texts[1], threads=1)
        assert "\n" not in str(refusal.value)


def test_a_crash_of_the_native_library_ends_in_one_line(tokenizer, texts, tmp_path):
    path = tmp_path / "x.gguf"
    written(path, make_model(**SHAPE), tokenizer)
    with running(1) as runtime:
        runtime.open(path, 96)
        os.kill(runtime._process.pid, signal.SIGSEGV)
        with pytest.raises(TransActError, match=r"crashed while running .*x\.gguf \(SIGSEGV\)"):
            runtime.losses(texts[1].ids[0].numpy())
