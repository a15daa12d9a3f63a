"""Damaged and hostile files: each is read, or refused in one line.

CI tries ten random inputs for each kind of file; more are tried with
`TRANSACT_FUZZ=1000 python -m pytest tests/trust/test_hostile.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import bench_of, make_model, make_tokenizer, windows_for
from tests.models.test_load import write_gguf
from transact_core.base.errors import TransActError
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.data.windows import tokenise
from transact_core.experiments.bench import Choices
from transact_core.export.compression import (
    describe_compression,
    parse_compression,
    read_compression,
)
from transact_core.models.load import load_model
from transact_core.pruning.plan import Decision

fuzzed = settings(
    max_examples=int(os.environ.get("TRANSACT_FUZZ", "10")),
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=20)
    | st.integers(min_value=-(2**70), max_value=2**70),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
DAMAGE = st.lists(
    st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4
)
"""Bytes that overwrite a file, and their offsets, which are taken modulo the file's size."""


def test_absurd_sizes_and_paths_that_leave_their_place_are_refused_within_bounded_memory():
    done = subprocess.run(
        [sys.executable, "-m", "tests.trust.absurd"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case for case in cases if not case["good"]] == []
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(cases) > 150


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A valid file of each kind. Tests damage copies of them."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = make_tokenizer()
    model = make_model(num_key_value_heads=3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    wide = make_model(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    write_gguf(folder / "model.gguf", wide, tokenizer)
    bench = bench_of(model, tokenizer, windows_for(tokenizer))
    plan = bench.plan(0.5, 0.3, Choices(granularity="head-dims"))
    stored = describe_compression(bench, Decision(plan), "least-squares").to_json()
    (folder / "compression.json").write_text(stored)
    words = ["one fish", "two fish", None]
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), folder / "text.parquet")
    (folder / "text.jsonl").write_text('{"text": "one fish"}\n"two fish"\n')
    (folder / "text.txt").write_text("one fish, zwölf Fische")
    return folder


def damaged(content: bytes, damage, within: int | None = None) -> bytes:
    """Overwrites parts of a file; `within` limits them to its first bytes, where the header is."""
    changed = bytearray(content)
    for place, piece in damage:
        start = place % (within or len(changed))
        changed[start : start + len(piece)] = piece
    return bytes(changed)


def read_or_refused(read) -> None:
    """Fails if reading raises anything other than a TransActError of one line."""
    message = ""
    try:
        read()
    except TransActError as error:
        message = str(error)
    assert "\n" not in message


def load_and_tokenise(folder) -> None:
    loaded = load_model(str(folder))
    text = corpus_from_text("some", read_corpus("builtin").text[:20_000])
    tokenise(text, loaded.tokenizer, loaded.architecture.vocab_size)


def linked(sources, folder, but: str) -> None:
    """Makes a checkpoint folder of hard links to every file except one."""
    folder.mkdir()
    for path in (sources / "model").iterdir():
        if path.name != but:
            os.link(path, folder / path.name)


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("model.safetensors", 3000),
        ("config.json", None),
        ("tokenizer.json", None),
        ("tokenizer_config.json", None),
        ("generation_config.json", None),
    ],
)
@fuzzed
@given(damage=DAMAGE)
def test_damaged_files_of_a_checkpoint(sources, tmp_path_factory, name, within, damage):
    folder = tmp_path_factory.mktemp("damaged") / "model"
    linked(sources, folder, name)
    content = (sources / "model" / name).read_bytes()
    (folder / name).write_bytes(damaged(content, damage, within))
    read_or_refused(lambda: load_and_tokenise(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@fuzzed
@given(data=st.data())
def test_odd_values_in_a_checkpoints_settings(sources, tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("odd") / "model"
    linked(sources, folder, name)
    stored = json.loads((sources / "model" / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        stored[data.draw(st.sampled_from(sorted(stored)))] = data.draw(JSON)
    (folder / name).write_text(json.dumps(stored))
    read_or_refused(lambda: load_and_tokenise(folder))


@pytest.mark.parametrize("name", ["architectures", "model_type"])
def test_a_name_of_several_lines_does_not_break_the_sentence(sources, tmp_path, name):
    linked(sources, tmp_path / "model", "config.json")
    stored = json.loads((sources / "model" / "config.json").read_text())
    stored |= {name: "a\nb"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(TransActError, match="only dense causal language models of the families"):
        load_model(str(tmp_path / "model"))
    read_or_refused(lambda: load_model(str(tmp_path / "model")))


@fuzzed
@given(damage=DAMAGE)
def test_damaged_gguf_files(sources, tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(damaged((sources / "model.gguf").read_bytes(), damage, 9000))
    read_or_refused(lambda: load_and_tokenise(path))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
@fuzzed
@given(damage=DAMAGE)
@example(damage=[(24, b"\x80")])  # invalid UTF-8 in a string of the Parquet file
def test_damaged_texts(sources, tmp_path_factory, name, damage):
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(damaged((sources / name).read_bytes(), damage))
    read_or_refused(lambda: read_corpus(str(path)))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@fuzzed
@given(
    content=st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
)
def test_texts_of_any_bytes(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("any") / f"text{suffix}"
    path.write_bytes(content)
    read_or_refused(lambda: read_corpus(str(path)))


@fuzzed
@given(damage=DAMAGE)
def test_a_damaged_compression(sources, tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("damaged") / "compression.json"
    path.write_bytes(damaged((sources / "compression.json").read_bytes(), damage))
    read_or_refused(lambda: read_compression(path))


@fuzzed
@given(data=st.data())
def test_odd_values_in_a_compression_never_pass_for_a_plan(sources, data):
    """An accepted file has a plan that fits the model; all others are refused before any cut."""
    stored = json.loads((sources / "compression.json").read_text())
    place = data.draw(st.sampled_from([stored, stored["plan"], stored["plan"]["layers"][0]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    architecture = load_model(str(sources / "model")).architecture
    read_or_refused(lambda: parse_compression(json.dumps(stored)).plan.check(architecture))
