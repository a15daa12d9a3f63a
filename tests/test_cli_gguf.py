"""The commands that write and run GGUF files."""

import json

import pytest
from gguf import GGUFReader

from tests.conftest import make_model
from tests.trust.installed import require_llama_cpp_installed
from transact_core.cli import main

require_llama_cpp_installed()

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def folder(tokenizer, tmp_path):
    place = tmp_path / "model"
    make_model(**SHAPE).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def refused(capsys, *arguments) -> str:
    """The line that a refused command prints."""
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_model_is_written_and_measured_in_both_runtimes(folder, text_file, tmp_path, capsys):
    file = tmp_path / "model.gguf"
    texts = ["--evaluation", str(text_file), "--evaluation-tokens", "256", "--json"]
    texts += ["--sequence-length", "64"]
    write = ["gguf", "--model", str(folder), "--quantization", "f32", "--output", str(file)]
    assert main(write) == 0
    printed = capsys.readouterr()
    assert f"{file.stat().st_size:,} bytes" in printed.out
    assert f"F32 will take {file.stat().st_size:,} bytes" in printed.err
    assert main(["evaluate", "--model", str(folder), *texts]) == 0
    stock = json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--model", str(file), "--runtime", "llama.cpp", *texts]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluation"] == stock["evaluation"]
    assert found["model"]["perplexity"] == pytest.approx(stock["model"]["perplexity"], rel=1e-4)
    assert found["model"]["file_bytes"] == file.stat().st_size
    assert found["runtime"].startswith("llama.cpp (xllamacpp ")


def test_a_cut_comes_with_its_gguf_files_and_their_figures(folder, text_file, tmp_path, capsys):
    output = tmp_path / "cut"
    texts = ["--calibration", str(text_file), "--calibration-tokens", "512"]
    texts += ["--evaluation", str(text_file), "--evaluation-tokens", "256"]
    command = ["prune", "--model", str(folder), "--mha-ratio", "0.5", "--mlp-ratio", "0.48"]
    command += ["--output", str(output), "--gguf", "Q8_0,q4_k_m", "--sequence-length", "64"]
    assert main([*command, *texts]) == 0
    printed = capsys.readouterr().err
    assert "For the GGUF files: --multiple-of 256." in printed
    card = (output / "README.md").read_text()
    for name in ("Q8_0", "Q4_K_M"):
        path = tmp_path / f"cut-{name}.gguf"
        fields = GGUFReader(path).fields
        assert fields["llama.feed_forward_length"].contents() == 256
        assert fields["general.name"].contents() == "cut"
        assert ("quantize.imatrix.dataset" in fields) == (name == "Q4_K_M")
        assert f"| `cut-{name}.gguf` | {name} |" in card
        assert f"{name} will take {path.stat().st_size:,} bytes" in printed
    assert "read by llama.cpp (xllamacpp" in card
    assert "rows of 64 are Q5_0 where Q4_K was meant" in printed


def test_what_was_asked_for_is_kept_beside_gguf(folder, text_file, tmp_path):
    texts = ["--calibration", str(text_file), "--calibration-tokens", "512"]
    texts += ["--evaluation", str(text_file), "--evaluation-tokens", "256"]
    command = ["prune", "--model", str(folder), "--mha-ratio", "0", "--mlp-ratio", "0.3"]
    command += ["--output", str(tmp_path / "cut"), "--gguf", "F16", "--sequence-length", "64"]
    assert main([*command, *texts, "--multiple-of", "8"]) == 0
    fields = GGUFReader(tmp_path / "cut-F16.gguf").fields
    assert fields["llama.feed_forward_length"].contents() == 360


@pytest.mark.usefixtures("short_texts")
def test_a_cut_of_allocated_widths_gives_the_same_perplexity_there(
    folder, text_file, tmp_path, capsys
):
    output, file = tmp_path / "cut", tmp_path / "cut-F32.gguf"
    texts = ["--calibration", str(text_file), "--calibration-tokens", "512"]
    texts += ["--evaluation", str(text_file), "--evaluation-tokens", "256", "--json"]
    command = ["prune", "--model", str(folder), "--mha-ratio", "0.5", "--mlp-ratio", "0.4"]
    command += ["--widths", "traded", "--multiple-of", "32", "--recovery", "none"]
    command += ["--output", str(output), "--gguf", "F32", "--sequence-length", "64"]
    assert main([*command, *texts]) == 0
    printed = capsys.readouterr()
    pruned = json.loads(printed.out)["pruned"]
    fields = GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "deci"
    for key, width in (
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        assert fields[f"deci.{key}"].contents() == [each[width] for each in pruned["layers"]]
    (line,) = [line for line in printed.err.splitlines() if line.startswith(f"{file}: ")]
    found = float(line.partition("perplexity ")[2].split()[0])
    assert found == pytest.approx(pruned["perplexity"], rel=1e-4)


@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp"])
def test_two_models_are_timed(folder, tmp_path, capsys, runtime):
    models = [folder, tmp_path / "other"]
    make_model(**SHAPE | {"intermediate_size": 32}).save_pretrained(models[1])
    for file in folder.glob("tokenizer*"):
        (models[1] / file.name).write_bytes(file.read_bytes())
    if runtime == "llama.cpp":
        for index, model in enumerate(models):
            models[index] = model.with_suffix(".gguf")
            write = ["gguf", "--model", str(model), "--quantization", "F16"]
            assert main([*write, "--output", str(models[index])]) == 0
    capsys.readouterr()
    command = ["latency", "--model", str(models[0]), "--against", str(models[1]), "--json"]
    command += ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2"]
    assert main([*command, "--runtime", runtime]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == list(map(str, models))
    for row in found["models"].values():
        assert row["prefill_tokens_per_second"] == pytest.approx(16 / row["prefill_seconds"])
        assert row["threads"] >= 1


def test_what_cannot_be_is_one_line(folder, text_file, tmp_path, capsys):
    file = tmp_path / "x.gguf"
    write = ("gguf", "--model", folder, "--output", file)
    assert "choose one of F32, F16" in refused(capsys, *write, "--quantization", "Q9")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF and nothing else")
    for run in ("evaluate", "latency"):
        in_llama_cpp = (run, "--runtime", "llama.cpp", "--model")
        assert "llama.cpp runs GGUF files" in refused(capsys, *in_llama_cpp, folder)
        assert "There is no GGUF file" in refused(capsys, *in_llama_cpp, file)
        assert "truncated, corrupt" in refused(capsys, *in_llama_cpp, damaged)
    assert "exists; name a new file" in refused(
        capsys, *write[:-1], damaged, "--quantization", "F16"
    )
    ratios = ("--mha-ratio", "0", "--mlp-ratio", "0.3", "--output", tmp_path / "damaged")
    beside = ("prune", "--model", folder, *ratios, "--gguf", "F16")
    (tmp_path / "damaged-F16.gguf").write_bytes(b"")
    assert "exists; name a new file" in refused(capsys, *beside)
    assert not (tmp_path / "damaged").exists()
