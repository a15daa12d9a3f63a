"""A folder and its GGUF files, published on the tests' own small hub."""

import json
import logging

import huggingface_hub
import pytest
from huggingface_hub import metadata_load

from tests.conftest import make_model
from tests.trust.hub import TOKEN
from transact_core.base.errors import TransActError
from transact_core.cli import main
from transact_core.export.publish import publish
from transact_core.models.hub import download


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "cut"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "README.md").write_text("---\ntags: [pruned]\n---\n# Cut\n")
    (place / "model.safetensors").write_bytes(b"weights" * 100)
    return place


def test_folder_and_files_are_there_afterwards(hub, folder, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "cut-Q8_0.gguf"
    file.write_bytes(b"GGUF" * 50)
    published = publish("tiny/model", folder, [file])
    for path in (*folder.iterdir(), file):
        assert (hub / path.name).read_bytes() == path.read_bytes()
    assert set(published.files) == {*(path.name for path in folder.iterdir()), file.name}
    assert published.bytes == sum(path.stat().st_size for path in (*folder.iterdir(), file))
    assert json.loads((hub / ".created.json").read_text())["visibility"] == "private"
    assert TOKEN not in caplog.text + published.address


@pytest.mark.parametrize("token", ["hf_of_somebody_else", None])
def test_who_may_not_write_is_told_and_nothing_arrives(hub, folder, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TransActError, match=r"let the present token|needs a token") as refusal:
        publish("tiny/model", folder)
    assert "\n" not in str(refusal.value)
    assert "somebody" not in str(refusal.value)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("name", ["model", "a/b/c", "../model", "a/..", "a b/c", "", "a/b\n"])
def test_names_that_are_none_are_refused(hub, folder, name):
    with pytest.raises(TransActError, match="OWNER/NAME"):
        publish(name, folder)


def test_a_hub_that_is_not_there_is_one_line_without_the_token(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransActError, match="was not published") as refusal:
        publish("tiny/model", folder)
    assert "\n" not in str(refusal.value)
    assert TOKEN not in str(refusal.value)


def test_a_cut_is_published_by_the_command_line(hub, tokenizer, text_file, tmp_path, capsys):
    source = tmp_path / "model"
    make_model(num_key_value_heads=3).save_pretrained(source)
    tokenizer.save_pretrained(source)
    command = ["prune", "--model", str(source), "--mha-ratio", "0", "--mlp-ratio", "0.3"]
    command += ["--output", str(tmp_path / "cut"), "--push-to-hub", "tiny/model", "--public"]
    for text in ("calibration", "evaluation"):
        command += [f"--{text}", str(text_file), f"--{text}-tokens", "256"]
    assert main([*command, "--sequence-length", "32"]) == 0
    printed = capsys.readouterr()
    assert "Published at http://127.0.0.1" in printed.err
    assert TOKEN not in printed.out + printed.err
    assert json.loads((hub / ".created.json").read_text())["visibility"] == "public"
    fetched = download("tiny/model")
    for path in (tmp_path / "cut").iterdir():
        assert (hub / path.name).read_bytes() == path.read_bytes()
    assert metadata_load(fetched / "README.md")["metrics"] == ["perplexity"]
