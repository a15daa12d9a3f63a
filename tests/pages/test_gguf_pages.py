"""Pages in llama.cpp: files written, measured, compared and published, on the tiny model."""

import logging
from dataclasses import replace

import pytest

from pages.server import gguf_files
from pages.server.request import Cut, Request
from pages.server.settings import settings
from pages.server.visitors import Visit
from tests.pages.conftest import ended, exchange
from tests.pages.test_pages import button, texts, work_of
from tests.trust.hub import TOKEN
from tests.trust.installed import require_llama_cpp_installed
from transact_core.base.errors import TransActError

CUT = Cut(0.5, 0.3, recovery="none")


@pytest.fixture(autouse=True)
def writable(monkeypatch, tmp_path):
    """The server lets pages write where the tests look."""
    allowed = replace(settings(), address="localhost", write_folders=(tmp_path,))
    exchange(monkeypatch, "settings", lambda: allowed)


@pytest.fixture
def mine():
    visit = Visit()
    visit.cut = CUT
    return visit


def said(page) -> str:
    return "\n".join([texts(page), *(each.value for each in page.success)])


def test_without_llama_cpp_plain_floats_are_written_and_the_rest_is_told(
    opened, open_page, mine, monkeypatch, tmp_path
):
    def refuse():
        raise TransActError("llama.cpp is not installed here: run `make llama-cpp`.")

    monkeypatch.setattr(gguf_files, "require_llama_cpp", refuse)
    monkeypatch.setattr("transact_core.workers.work.llama_cpp_version", lambda: None)
    page = open_page("export", mine)
    assert not page.exception
    assert "llama.cpp is not installed here" in said(page)
    assert page.selectbox(key="gguf_type").options == ["F32", "F16", "BF16"]
    path = tmp_path / "cut.gguf"
    next(box for box in page.text_input if box.label.startswith("File on")).set_value(str(path))
    job = work_of(page.run(), "Write the file")
    page.run()
    assert f"{path.stat().st_size:,} bytes" in said(page)
    assert f"({path.stat().st_size:,} bytes), of which embedding" in said(page)
    assert job.result[1] is None
    for name in ("latency", "compare"):
        page = open_page(name, mine)
        page.segmented_control(key=f"{name}_runtime").set_value("llama.cpp").run()
        assert "llama.cpp is not installed here" in said(page)
        assert all(each.disabled for each in page.button if each.label in ("Run both",))


def test_a_cut_is_written_and_published_and_the_token_is_seen_nowhere(
    opened, open_page, mine, hub, tmp_path, caplog, capfd
):
    require_llama_cpp_installed()
    caplog.set_level(logging.DEBUG)
    folder, file = tmp_path / "cut", tmp_path / "cut-Q8_0.gguf"
    page = open_page("export", mine)
    assert "Write the checkpoint of this cut first" in said(page)
    next(box for box in page.text_input if box.label.startswith("Folder")).set_value(str(folder))
    work_of(page.run(), "Write the checkpoint")
    page.selectbox(key="gguf_type").set_value("Q8_0").run()
    assert "rows of 48 are F16 where Q8_0 was meant" in said(page)
    next(box for box in page.text_input if box.label.startswith("File on")).set_value(str(file))
    job = work_of(page.run(), "Write the file")
    page.run()
    assert f"{file.stat().st_size:,} bytes, perplexity {job.result[1]:.2f} in" in said(page)
    card = (folder / "README.md").read_text()
    assert "| `cut-Q8_0.gguf` | Q8_0 |" in card
    assert "read by llama.cpp (xllamacpp" in card

    page.text_input(key="hub_repository").set_value("tiny/model")
    page.text_input(key="hub_token").set_value(TOKEN).run()
    job = work_of(page, "Publish")
    page.run()
    assert "published at" in said(page)
    for path in (*folder.iterdir(), file):
        assert (hub / path.name).read_bytes() == path.read_bytes()
    other = open_page("export", Visit())
    printed = capfd.readouterr()
    for seen in (caplog.text, printed.out, printed.err, said(page), said(other), repr(vars(job))):
        assert TOKEN not in seen
    assert all(TOKEN not in str(box.value) for box in other.text_input)
    assert "tiny/model" not in said(other)


def test_who_comes_over_a_network_needs_a_token_of_their_own(
    opened, open_page, mine, hub, tmp_path, monkeypatch
):
    folder = tmp_path / "cut"
    page = open_page("export", mine)
    next(box for box in page.text_input if box.label.startswith("Folder")).set_value(str(folder))
    work_of(page.run(), "Write the checkpoint")
    exchange(monkeypatch, "uses_own_login", lambda: False)
    page.run()
    page.text_input(key="hub_repository").set_value("tiny/model").run()
    assert button(page, "Publish").disabled
    page.text_input(key="hub_token").set_value("hf_of_somebody_else").run()
    button(page, "Publish").click().run()
    job = ended(mine.visitor.jobs[-1])
    assert "let the present token" in job.error
    assert "somebody" not in job.error
    assert list(hub.iterdir()) == []


def test_files_are_measured_and_compared_on_the_deploy_page(opened, open_page, mine):
    require_llama_cpp_installed()
    page = open_page("deploy", mine)
    assert not page.exception
    assert "Nothing is measured in llama.cpp yet" in said(page)
    assert page.code[0].value == "llama-bench -m out.gguf -p 256 -n 64 -t 4 -r 5"
    work_of(
        open_page("compress", mine, mha="50", mlp="30", recovery="none"),
        "Prune and measure perplexity",
    )
    page = open_page("deploy", mine)
    page.multiselect(key="deploy_types").set_value(["F32", "Q4_0"])
    page.toggle(key="deploy_timed").set_value(False).run()
    work_of(page, "Measure 4 files")
    page.run()
    assert not page.exception
    assert button(page, "All of these are measured").disabled
    assert "For size, " in said(page)
    (table,) = (each.value for each in page.dataframe if "on_frontier" in each.value)
    assert sorted(table["type"]) == ["F32", "F32", "Q4_0", "Q4_0"]
    assert "nats a token" in said(page)
    page.toggle(key="files_best").set_value(True).run()
    (best,) = (each.value for each in page.dataframe if "on_frontier" in each.value)
    assert 0 < len(best) <= 4
    assert best["on_frontier"].all()
    # Another visitor of the same model and text sees what was measured, and measures nothing again.
    other = open_page("deploy", Visit())
    (seen,) = (each.value for each in other.dataframe if "on_frontier" in each.value)
    assert len(seen) == 4

    curve = open_page("perplexity", mine)
    curve.segmented_control(key="curve_runtime").set_value("llama.cpp").run()
    curve.selectbox(key="curve_type").set_value("F32").run()
    assert not curve.exception
    assert "that of a F32 file in llama.cpp" in said(curve)


def test_both_models_are_timed_and_compared_in_llama_cpp(opened, open_page, mine):
    require_llama_cpp_installed()
    page = open_page("latency", mine)
    page.segmented_control(key="latency_runtime").set_value("llama.cpp").run()
    page.selectbox(key="latency_type").set_value("F16")
    page.multiselect(key="lengths").set_value([16, 32])
    page.number_input(key="repeats").set_value(1).run()
    work_of(page, "Time both models")
    page.run()
    assert not page.exception
    assert "in llama.cpp as F16" in said(page)
    (table,) = (each.value for each in page.dataframe if "peak memory MB" in each.value)
    assert list(table["model"]) == ["dense", "pruned"]

    page = open_page("compare", mine)
    page.segmented_control(key="compare_runtime").set_value("llama.cpp").run()
    page.selectbox(key="compare_type").set_value("F32")
    page.number_input(key="new_tokens").set_value(5).run()
    work_of(page, "Run both")
    page.run()
    in_llama_cpp = mine.visitor.of(Request()).found["compare"]
    page.segmented_control(key="compare_runtime").set_value("transformers").run()
    work_of(page, "Run both")
    in_transformers = mine.visitor.of(Request()).found["compare"]
    assert in_llama_cpp.quantization == "F32"
    assert in_llama_cpp.answers == in_transformers.answers
