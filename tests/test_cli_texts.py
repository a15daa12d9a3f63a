"""Several evaluation texts, from the command line."""

import json

import pytest

from transact_core.cli import main
from transact_core.data.corpus import read_corpus

TOKENS = ["--evaluation-tokens", "128", "--sequence-length", "32"]


@pytest.fixture
def texts(tmp_path):
    text = read_corpus("builtin").text
    paths = [tmp_path / f"{name}.txt" for name in ("one", "two", "a|b")]
    for number, path in enumerate(paths):
        path.write_text(text[number * 9000 : (number + 1) * 9000])
    return [str(path) for path in paths]


def evaluations(texts):
    return [word for text in texts for word in ("--evaluation", text)]


def test_a_cut_is_measured_on_every_text(checkpoint, texts, tmp_path, capsys):
    output = tmp_path / "out"
    cut = ["--model", str(checkpoint), "--mha-ratio", "0.5", "--mlp-ratio", "0.3"]
    calibration = ["--calibration", texts[0], "--calibration-tokens", "512"]
    given = [*cut, *calibration, *evaluations(texts), *TOKENS]
    assert main(["prune", *given, "--output", str(output)]) == 0
    assert capsys.readouterr().out.count("perplexity on another") == 2
    report = json.loads((output / "report.json").read_text())
    assert report["evaluation"]["source"] == texts[0]
    assert [text["source"] for text in report["other_texts"]] == texts[1:]
    assert "a\\|b.txt" in (output / "README.md").read_text()
    # What stands of the other texts is what `evaluate` measures on them.
    for model, side in ((str(checkpoint), "dense"), (str(output), "pruned")):
        assert main(["evaluate", "--model", model, *evaluations(texts), *TOKENS, "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["model"]["perplexity"] == report[side]["perplexity"]
        for text, expected in zip(measured["other_texts"], report["other_texts"], strict=True):
            assert text.pop("perplexity") == expected[side]["perplexity"]
            assert text == {key: expected[key] for key in text}


def test_one_text_leaves_the_report_as_it_was(checkpoint, texts, capsys):
    assert (
        main(["evaluate", "--model", str(checkpoint), *evaluations(texts[:1]), *TOKENS, "--json"])
        == 0
    )
    assert set(json.loads(capsys.readouterr().out)) == {"model", "evaluation"}


def test_a_text_that_is_named_twice_is_refused(checkpoint, texts, tmp_path, capsys):
    cut = ["--model", str(checkpoint), "--mha-ratio", "0.5", "--mlp-ratio", "0.3"]
    twice = evaluations([texts[0], texts[0]])
    assert main(["prune", *cut, *twice, *TOKENS, "--output", str(tmp_path / "out")]) == 2
    assert "named once" in capsys.readouterr().err
