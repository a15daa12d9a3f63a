"""What an export keeps and says of the source model's licence."""

import os

import pytest
from huggingface_hub import metadata_load

from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.export.compression import describe_compression
from transact_core.export.folder import write_checkpoint
from transact_core.export.licence import front_matter_lines, licence_lines, name_under_licence
from transact_core.models.licence import Licence, read_licence
from transact_core.models.load import load_model
from transact_core.pruning.plan import Decision


def front_matter(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A model\n")


@pytest.fixture
def licensed(checkpoint):
    front_matter(checkpoint, "license: llama3.2\nlicense_link: LICENSE.txt")
    (checkpoint / "LICENSE.txt").write_text("terms")
    (checkpoint / "USE_POLICY.md").write_text("policy")
    return checkpoint


def exported(folder, windows, output):
    bench = Bench(load_model(str(folder)), *windows)
    plan = bench.plan(0.5, 0.3, Choices())
    model, measurement = compress(bench, plan, "none")
    compression = describe_compression(bench, Decision(plan), "none")
    write_checkpoint(output, model, bench, measurement, compression)
    return output


def test_an_export_carries_licence_and_name(licensed, windows, tmp_path):
    output = exported(licensed, windows, tmp_path / "out")
    assert {"LICENSE.txt", "USE_POLICY.md", "NOTICE"} <= set(os.listdir(output))
    assert (output / "LICENSE.txt").read_text() == "terms"
    assert "Llama 3.2 is licensed under the Llama 3.2" in (output / "NOTICE").read_text()
    card = (output / "README.md").read_text()
    assert "\n# Llama checkpoint, pruned\n" in card
    assert "`llama3.2`, hold for this one. Built with Llama.\n" in card
    assert metadata_load(output / "README.md")["license"] == "llama3.2"
    # A cut of the cut knows it too.
    assert load_model(str(output)).licence == Licence("llama3.2", None, "LICENSE.txt")


def test_an_export_without_a_licence_says_the_general_thing(checkpoint, windows, tmp_path):
    output = exported(checkpoint, windows, tmp_path / "out")
    assert not {"LICENSE", "NOTICE"} & set(os.listdir(output))
    card = (output / "README.md").read_text()
    assert "The terms of the dense model's licence hold for this one." in card
    assert "\n# checkpoint, pruned\n" in card


def test_a_notice_of_the_source_is_kept_as_it_is(licensed, windows, tmp_path):
    (licensed / "Notice.txt").write_text("theirs")
    output = exported(licensed, windows, tmp_path / "out")
    assert (output / "Notice.txt").read_text() == "theirs"
    assert not (output / "NOTICE").exists()


@pytest.mark.parametrize(
    ("licence", "name", "expected"),
    [
        (Licence("llama3.2"), "Tiny", "Llama Tiny"),
        (Licence("llama3.1"), "llama-tiny", "llama-tiny"),
        (Licence("llama3"), "Llama-3-8B", "Llama-3-8B"),
        (Licence("llama3"), "Hermes", "Llama 3 Hermes"),
        (Licence("other", "llama3.3"), "Hermes", "Llama Hermes"),
        (Licence("llama2"), "Vicuna", "Vicuna"),
        (Licence("apache-2.0"), "SmolLM2", "SmolLM2"),
        (None, "SmolLM2", "SmolLM2"),
    ],
)
def test_names_begin_as_the_licence_demands(licence, name, expected):
    assert name_under_licence(name, licence).strip() == expected


def test_what_is_built_with_llama_says_so():
    assert licence_lines(Licence("llama3.1")).endswith("Built with Llama.")
    assert licence_lines(Licence("llama3")).endswith("Built with Meta Llama 3.")
    assert "Built" not in licence_lines(Licence("llama2"))
    assert "`apache-2.0`" in licence_lines(Licence("apache-2.0"))


@pytest.mark.parametrize(
    "text", ["", "license: [", "license: 5", "license: {a: b}", "license: " + "x" * 1000, "- a"]
)
def test_front_matter_that_is_none_names_no_licence(tmp_path, text):
    front_matter(tmp_path, text)
    assert read_licence(tmp_path) is None


def test_nothing_in_a_field_gets_out_of_the_front_matter(tmp_path):
    licence = Licence("other", 'x: "y" # z', "https://a/b?c=d")
    front_matter(tmp_path, front_matter_lines(licence).strip())
    assert read_licence(tmp_path) == licence
    assert "<b>" not in licence_lines(Licence("<b>`"))
