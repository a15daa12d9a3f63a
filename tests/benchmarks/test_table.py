import csv
import dataclasses
import json

import pytest

from benchmarks import cuts, table
from benchmarks.cuts import CUTS, DENSE, PUBLISHED, UNCUT, Row, rows
from benchmarks.row import find_row, kv_bytes_per_token, make_row, published_mha_ratio
from tests.conftest import loaded_from, make_model, same_weights, snapshot
from transact_core.experiments.bench import Choices
from transact_core.importance.scores import IMPORTANCES
from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import RECOVERIES

MLP, HEADS = CUTS[1], CUTS[3]
KV_CACHE = next(cut for cut in CUTS if cut.narrows_kv_cache)


def test_every_importance_and_recovery_has_a_row_for_every_cut():
    for cut in CUTS:
        asked = {
            (row.choices.importance, row.choices.recovery)
            for row in rows()
            if row.cut == cut and row.choices
        }
        assert asked >= {
            (importance, recovery) for importance in IMPORTANCES for recovery in RECOVERIES
        }


def test_rows_have_names_of_their_own():
    keys = [row.key for row in rows()]
    assert len(keys) == len(set(keys))
    assert keys[0] == (UNCUT.name, DENSE)
    assert {row.key for row in rows(quick=True)} < set(keys)
    assert all(find_row(*row.key) == row for row in rows())


def test_the_kv_cache_is_cut_by_granularities_that_narrow_it():
    asked = {row.choices.granularity for row in rows() if row.cut == KV_CACHE and row.choices}
    assert asked == {"kv-groups", "head-dims"}
    asked = {row.choices.granularity for row in rows() if row.cut == HEADS and row.choices}
    assert asked == {"query-heads", "auto"}
    assert {row.choices.steps for row in rows() if row.cut == MLP and row.choices} == {1, 4}


def test_published_rounding_keeps_the_wider_number_of_heads(tokenizer):
    loaded = loaded_from(make_model(num_key_value_heads=3), tokenizer)
    assert published_mha_ratio(Row(HEADS, PUBLISHED), loaded) == 0
    assert published_mha_ratio(Row(CUTS[4], PUBLISHED), loaded) == 0.5
    assert published_mha_ratio(Row(MLP, PUBLISHED), loaded) == 0


@pytest.mark.parametrize("cut", [MLP, KV_CACHE], ids=lambda cut: cut.name)
def test_a_row_is_measured_as_reloaded(cut, gqa_model, tokenizer, windows):
    before = snapshot(gqa_model)
    choices = Choices(granularity=cut.granularity, recovery="least-squares")
    result = make_row(Row(cut, "ours", choices), loaded_from(gqa_model, tokenizer), *windows)
    assert same_weights(gqa_model, before)
    assert result.note == ""
    assert result.reloaded_by_stock == "yes"
    assert result.perplexity > 1
    assert result.parameters < gqa_model.num_parameters()
    assert result.peak_memory_bytes > 50_000_000
    dense = kv_bytes_per_token(gqa_model, gqa_model.dtype)
    assert result.kv_bytes_per_token == (dense * 2 // 3 if cut is KV_CACHE else dense)


def test_the_dense_row_is_the_dense_model(gqa_bench):
    result = make_row(
        Row(UNCUT, DENSE), gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation
    )
    assert result.perplexity == pytest.approx(gqa_bench.dense().perplexity, rel=1e-6)
    assert result.kv_bytes_per_token == gqa_bench.dense_footprint.kv_bytes_per_token
    assert result.parameters == Architecture.from_config(gqa_bench.loaded.model.config).parameters


def test_what_stock_cannot_load_is_measured_in_memory(gqa_model, tokenizer, windows, monkeypatch):
    def lopsided(model, tokenizer, calibration, target):
        mlp = model.model.layers[0].mlp
        for name in ("gate_proj", "up_proj"):
            projection = getattr(mlp, name)
            projection.weight = type(projection.weight)(projection.weight[:30])
        mlp.down_proj.weight = type(mlp.down_proj.weight)(mlp.down_proj.weight[:, :30])
        return model

    other = dataclasses.replace(next(iter(cuts.BASELINES.values())), make=lopsided)
    monkeypatch.setitem(cuts.BASELINES, "lopsided", other)
    result = make_row(Row(MLP, "lopsided"), loaded_from(gqa_model, tokenizer), *windows)
    assert result.reloaded_by_stock == "no"
    assert "measured in memory" in result.note
    assert result.perplexity > 1


def test_what_fails_is_a_row_with_a_reason(gqa_model, tokenizer, windows, monkeypatch):
    def broken(model, tokenizer, calibration, target):
        raise RuntimeError("no such thing")

    other = dataclasses.replace(next(iter(cuts.BASELINES.values())), make=broken)
    monkeypatch.setitem(cuts.BASELINES, "broken", other)
    result = make_row(Row(MLP, "broken"), loaded_from(gqa_model, tokenizer), *windows)
    assert result.perplexity is None
    assert "no such thing" in result.note


def test_one_command_makes_the_table_and_goes_on_with_it(checkpoint, text_file, tmp_path, capsys):
    output, page = tmp_path / "results.csv", tmp_path / "results.md"
    arguments = [
        "--model",
        str(checkpoint),
        "--calibration",
        str(text_file),
        "--evaluation",
        str(text_file),
        "--calibration-tokens",
        "256",
        "--evaluation-tokens",
        "128",
        "--sequence-length",
        "32",
        "--output",
        str(output),
        "--markdown",
        str(page),
        "--only",
        "^30 % of the MLP: TransAct",
    ]
    assert table.main(arguments) == 0
    with output.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [DENSE, PUBLISHED]
    assert lines[0]["ratio_to_dense"] == "1.0"
    assert float(lines[1]["seconds"]) > 0
    assert {line["reloaded_by_stock"] for line in lines} == {"yes"}
    text = page.read_text()
    assert "### Removed: 30 % of the MLP" in text
    assert "python -m benchmarks.table" in text

    assert table.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    written = output.read_text()
    assert table.main([*arguments, "--resume"]) == 0
    assert output.read_text() == written
    beside = output.with_suffix(".csv.json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"texts": {}}))
    assert table.main([*arguments, "--resume"]) == 2


def test_the_best_of_a_cut_comes_first_and_failures_last():
    settings = {
        "command": "command",
        "versions": {"torch": "2"},
        "setup": {
            "model": "m",
            "calibration_tokens": 1,
            "evaluation_tokens": 1,
            "sequence_length": 1,
            "share_measurements": False,
        },
    }
    empty = dict.fromkeys(table.COLUMNS) | {"processor": "P", "threads": 2, "date": "2026-11-02"}
    lines = [
        empty | {"cut": "x", "method": "broken", "note": "refused: a|b"},
        empty | {"cut": "x", "method": "worse", "perplexity": "20"},
        empty | {"cut": "x", "method": "better", "perplexity": 10.0, "reloaded_by_stock": "yes"},
    ]
    text = table.markdown(lines, settings)
    assert text.index("better") < text.index("worse") < text.index("broken")
    assert "a\\|b" in text
    assert "Machine: P, 2 threads." in text
    assert "| machine |" not in text
    lines.append(empty | {"cut": "x", "method": "best", "perplexity": 9, "threads": 1})
    lines.append(lines[-1] | {"method": "last", "date": "2026-11-01", "perplexity": None})
    text = table.markdown(lines, settings)
    assert "(1) P, 2 threads; (2) P, 1 thread" in text
    assert "2026-11-01 to 2026-11-02" in text
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if "–" in row}
    assert rows["best"].endswith("| 2 |")
    assert rows["better"].endswith("| 1 |")


def test_each_importance_stands_beside_its_recoveries():
    row = {"cut": MLP.name, "processor": "P", "threads": 2, "date": "2026-11-02"}
    ratios = {
        "activation, least-squares": 1.2,
        "activation, none": 1500,
        "taylor, none": 1.75,
        "taylor, least-squares, sequential": 1.1,
    }
    lines = [
        dict.fromkeys(table.COLUMNS) | row | {"method": f"ours: {name}", "ratio_to_dense": ratio}
        for name, ratio in ratios.items()
    ]
    grid = [
        "| ours, × dense | least-squares | none |",
        "| --- | ---: | ---: |",
        "| activation | 1.200 | 1,500 |",
        "| taylor |  | 1.750 |",
    ]
    assert table._grid(lines)[:-1] == grid
    assert table._grid(lines[:1]) == []
