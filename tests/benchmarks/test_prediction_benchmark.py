import json

from benchmarks import prediction


def test_points_are_measured_once_and_compared_with_predictions(checkpoint, tmp_path, capsys):
    output = tmp_path / "points.jsonl"
    arguments = (
        f"--model {checkpoint} --recovery none --calibration-tokens 512 --evaluation-tokens 256 "
        f"--sequence-length 32 --first 3 --check 4 --limit 30 --output {output}"
    ).split()
    assert prediction.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    places = [(row["mha_width"], row["mlp_width"]) for row in rows]
    assert len(set(places)) == len(places) == 7
    for mha_width, mlp_width in places:
        assert f"| {mha_width} | {mlp_width} |" in printed
    before = output.read_bytes()
    assert prediction.main(arguments) == 0
    assert output.read_bytes() == before
    assert capsys.readouterr().out == printed


def test_other_settings_are_other_points(checkpoint, tmp_path, capsys):
    output = tmp_path / "points.jsonl"
    for importance in ("activation", "magnitude"):
        arguments = (
            f"--model {checkpoint} --recovery none --calibration-tokens 512 --importance {importance} "
            f"--evaluation-tokens 256 --sequence-length 32 --first 1 --check 1 --limit 30 --output {output}"
        ).split()
        assert prediction.main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["importance"] for row in rows} == {"activation", "magnitude"}
    assert len(rows) == 4


def test_a_mistake_is_one_line(tmp_path, capsys):
    arguments = ["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "points.jsonl")]
    assert prediction.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
