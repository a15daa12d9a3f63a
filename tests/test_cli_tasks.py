"""`tasks`, from the command line."""

import json

import pytest

from transact_core.cli import main

pytest.importorskip("lm_eval")


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    row = {"goal": "To cut", "sol1": "use a knife", "sol2": "use a spoon", "label": 0}
    (folder / "piqa.jsonl").write_text(f"{json.dumps(row)}\n" * 6)
    return folder


def refused(capsys, complaint):
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert complaint in lines[0]


def test_a_model_against_itself_differs_in_nothing(checkpoint, rows, tmp_path, capsys):
    output = tmp_path / "tasks.json"
    model = ["--model", str(checkpoint), "--against", str(checkpoint)]
    data = ["--tasks", "piqa", "--task-data", str(rows), "--limit", "4"]
    assert main(["tasks", *model, *data, "--output", str(output), "--json"]) == 0
    written = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == written
    piqa = written["tasks"]["piqa"]
    assert piqa["model"] == piqa["against"]
    assert piqa["model"]["n"] == 4
    assert piqa["difference"] == {
        "acc": 0,
        "acc_stderr": 0,
        "acc_norm": 0,
        "acc_norm_stderr": 0,
        "n": 4,
    }
    assert (written["seed"], written["limit"]) == (0, 4)
    assert main(["tasks", *model, *data, "--output", str(output)]) == 2
    refused(capsys, "exists; name a new file")


def test_without_names_the_tasks_are_made_of_a_text(checkpoint, text_file, capsys):
    text = ["--text", str(text_file), "--limit", "3"]
    assert main(["tasks", "--model", str(checkpoint), *text]) == 0
    table = capsys.readouterr().out
    assert "continuation" in table
    assert "last_word" in table


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tasks", "arc_easy"], "has no arc_easy.jsonl; it has data of piqa"),
        (["--tasks", "piqa", "--few-shot", "2"], "piqa.train.jsonl is not there"),
        (["--tasks", "piqa", "--few-shot", "-1"], "is a negative number"),
        (["--tasks", "piqa", "--limit", "0"], "is not a positive number"),
        (["--tasks", "piqa", "--against", "no/such/model"], "There is no model at"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(checkpoint, rows, capsys, options, complaint):
    model = ["--model", str(checkpoint), "--task-data", str(rows)]
    assert main(["tasks", *model, *options]) == 2
    refused(capsys, complaint)


def test_scores_are_recorded_in_an_output_folder(checkpoint, rows, text_file, tmp_path, capsys):
    output = tmp_path / "out"
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file)]
    sizes = ["--calibration-tokens", "128", "--evaluation-tokens", "64", "--sequence-length", "32"]
    cut = ["--mha-ratio", "0.5", "--mlp-ratio", "0.3", "--recovery", "none"]
    assert (
        main(["prune", "--model", str(checkpoint), *cut, *texts, *sizes, "--output", str(output)])
        == 0
    )
    before, card = (output / "report.json").read_text(), (output / "README.md").read_text()
    capsys.readouterr()
    data = ["--tasks", "piqa", "--task-data", str(rows), "--record", "--json"]
    models = ["--model", str(output), "--against", str(checkpoint)]
    assert main(["tasks", *models, *data]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((output / "report.json").read_text()) == {
        **json.loads(before),
        "tasks": result,
    }
    with_table = (output / "README.md").read_text()
    start, end = with_table.index("## Tasks"), with_table.index("Method: ")
    assert with_table[:start].rstrip() + "\n\n" + with_table[end:] == card
    assert with_table[start:end].count("| piqa |") == 2
    # Recorded again, the table takes the place of the one before.
    assert main(["tasks", *models, *data]) == 0
    assert (output / "README.md").read_text() == with_table
    capsys.readouterr()
    assert main(["tasks", "--model", str(checkpoint), *data]) == 2
    refused(capsys, "is not a folder that prune has written")
