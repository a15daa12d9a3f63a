"""GGUF files of a bench: sizes told before, points measured once and kept, what they say."""

import pytest
import torch

from tests.conftest import bench_of, make_model, windows_for
from tests.trust.installed import require_llama_cpp_installed
from transact_core.experiments.bench import Choices, compress
from transact_core.export import gguf_points
from transact_core.export.gguf_points import (
    NAME_ROOM,
    FilePoint,
    Times,
    bytes_by_widths,
    kept_points,
    measure_files,
    planned_files,
    verdict,
    write_gguf,
)
from transact_core.forward.perplexity import Evaluation
from transact_core.planning.preview import structure

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@pytest.fixture
def small_bench(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    return bench_of(make_model(**SHAPE), tokenizer, windows_for(tokenizer, 256, 128, 32))


def cut_of(bench, granularity="query-heads", recovery="none"):
    """A pruned model and its point."""
    plan = bench.plan(0.5, 1 / 3, Choices(granularity=granularity, recovery=recovery))
    return compress(bench, plan, recovery)


@pytest.mark.parametrize("granularity", ["query-heads", "head-dims"])
@pytest.mark.parametrize("recovery", ["none", "bias"])
def test_sizes_told_before_are_those_of_the_files(small_bench, granularity, recovery, tmp_path):
    model, point = cut_of(small_bench, granularity, recovery)
    planned = planned_files(small_bench, point.plan, recovery, "a cut", types=["F32", "BF16"])
    for file in planned:
        path = tmp_path / f"{file.quantization}.gguf"
        write_gguf(path, small_bench, model, point, file.quantization, "a cut")
        assert path.stat().st_size == file.bytes


def test_without_a_plan_the_files_are_the_dense_models(small_bench, tmp_path):
    (planned,) = planned_files(small_bench, None, "none", "dense", types=["F16"])
    model = small_bench.loaded.model
    write_gguf(tmp_path / "x.gguf", small_bench, model, None, "F16", "dense")
    assert (tmp_path / "x.gguf").stat().st_size == planned.bytes


@pytest.mark.parametrize(
    ("granularity", "recovery", "kind"),
    [
        ("query-heads", "none", "Q4_K_M"),
        ("kv-groups", "none", "Q2_K"),
        ("head-dims", "none", "Q8_0"),
        ("query-heads", "bias", "Q8_0"),
    ],
)
def test_sizes_of_all_widths_are_those_of_files_planned_one_by_one(
    small_bench, granularity, recovery, kind
):
    shape = small_bench.loaded.architecture
    table = structure(shape, granularity, with_biases=recovery == "bias")
    sizes = bytes_by_widths(small_bench, table, recovery, kind)
    assert len(sizes) == len(table.mha.options) * len(table.mlp.options)
    for mha, mlp in [(0, 0), (0, 45), (60, 0), (60, 70), (34, 33)]:
        plan = small_bench.plan(mha / 100, mlp / 100, Choices(granularity=granularity))
        name = "x" * NAME_ROOM
        (file,) = planned_files(small_bench, plan, recovery, name, types=[kind])
        left = plan.applied_to(shape)
        # The header is filled up to a multiple of 32 bytes, with biases to another one.
        assert abs(sizes[left.mha_width, left.intermediate_size] - file.bytes) <= 32
        assert recovery == "bias" or sizes[left.mha_width, left.intermediate_size] == file.bytes


def test_points_are_measured_once_and_kept(small_bench, monkeypatch):
    require_llama_cpp_installed()
    model, point = cut_of(small_bench)
    dense = small_bench.loaded.model
    (whole,) = measure_files(small_bench, lambda: dense, None, ["F32"], timed=False)
    assert whole.perplexity == pytest.approx(small_bench.dense().perplexity, rel=1e-4)
    found = list(measure_files(small_bench, lambda: model, point, ["F32", "Q4_0"], timed=False))
    assert found[0].perplexity == pytest.approx(point.perplexity, rel=1e-4)
    assert [each.imatrix for each in found] == [False, True]
    assert (found[0].model, found[0].mlp_width) == ("2 heads, MLP 64", 64)
    (timed,) = measure_files(small_bench, lambda: model, point, ["Q4_0"], timed=True)
    assert min(vars(timed.times)[name] for name in ("prefill_speedup", "decode_speedup")) > 0
    monkeypatch.setattr(gguf_points, "write_gguf", None)  # nothing is written any more
    again = list(measure_files(small_bench, lambda: model, point, ["F32", "Q4_0"], timed=False))
    assert [each.bytes for each in again] == [each.bytes for each in found]
    assert again[1].times == timed.times
    assert torch.equal(again[1].evaluation.nll, found[1].evaluation.nll)
    assert [each.name for each in kept_points(small_bench)] == [
        "dense · F32",
        "2 heads, MLP 64 · F32",
        "2 heads, MLP 64 · Q4_0",
    ]


def file_point(model, kind, size, perplexity, speed=None) -> FilePoint:
    times = speed and Times(100 * speed, 10 * speed, speed, speed, None, 1.0, 1)
    nll = torch.full((1, 2), perplexity).log()
    dense = model == "dense"
    own = {} if dense else {"recovery": "none", "granularity": "x", "importance": "y"}
    return FilePoint(
        model, kind, False, size, Evaluation(nll), 1.0, 1, 1, "r", "d", **own, times=times
    )


def test_pruning_is_advised_against_where_a_dense_file_is_as_small_and_as_good():
    dense = [file_point("dense", "F16", 200, 10.0, 1.0), file_point("dense", "Q4_0", 90, 12.0, 1.5)]
    cut = file_point("6 heads", "Q8_0", 120, 15.0, 3.0)
    assert verdict(dense) == []
    said = " ".join(verdict([*dense, cut]))
    assert "do not prune, quantise" in said
    assert "dense · Q4_0" in said
    assert "For prefill, pruning pays: the fastest pruned file, 6 heads · Q8_0" in said
    assert "2.00 times as fast" in said


def test_pruning_is_advised_where_no_dense_file_is_as_small_and_as_good():
    dense = [file_point("dense", "Q4_0", 90, 12.0, 2.0)]
    cuts = [file_point("6 heads", "Q4_0", 70, 14.0, 1.0), file_point("6 heads", "F16", 95, 13.0)]
    said = " ".join(verdict([*dense, *cuts]))
    assert "pays in 1 of 2 pruned files" in said
    assert "6 heads · Q4_0" in said
    assert "For decoding, pruning does not pay" in said
