import copy
import json

import pandas as pd
import pytest

from tests.conftest import VOCAB_SIZE
from transact_core.base.errors import TransActError
from transact_core.base.files import sha256_of_text
from transact_core.data.corpus import corpus_from_text, for_model, read_corpus
from transact_core.data.windows import WindowSpec, make_windows, tokenise

TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}"
)
ASKED = "user: one?\nassistant: fish"
WRITTEN = "<s>[user] one?\n<s>[assistant] fish\n"


@pytest.fixture
def chatting(tokenizer):
    """The tokenizer with a chat template that writes special tokens itself."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def turns(role, content, *names):
    return [{role: name, content: text} for name, text in zip(names, ("one?", "fish"), strict=True)]


ROWS = {
    "messages": {"messages": turns("role", "content", "user", "assistant")},
    "sharegpt": {"conversations": turns("from", "value", "human", "gpt")},
    "conversations": {"conversations": turns("role", "content", "user", "assistant")},
    "alpaca": {"instruction": "one?", "input": "", "output": "fish"},
    "dolly": {"instruction": "one?", "response": "fish"},
    "completion": {"prompt": "one?", "completion": "fish"},
    "response": {"prompt": "one?", "response": "fish"},
    "prompt of turns": {
        "prompt": [{"role": "user", "content": "one?"}],
        "completion": [{"role": "assistant", "content": "fish"}],
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "fish"}]},
        ]
    },
}


def write(path, *rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, **row}) for row in rows))
    else:
        pd.DataFrame(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_conversations_are_written_by_the_models_chat_template(tmp_path, chatting, kind, suffix):
    corpus = read_corpus(write(tmp_path / f"rows{suffix}", ROWS[kind], ROWS[kind]))
    assert corpus.text == f"{ASKED}\n\n{ASKED}"
    written = for_model(corpus, chatting)
    assert written.text == 2 * WRITTEN
    assert written.sha256 == sha256_of_text(2 * WRITTEN)
    assert written.notices == ()


def test_an_instructions_input_follows_it(tmp_path):
    row = {"instruction": "one?", "input": "of these", "output": "fish"}
    corpus = read_corpus(write(tmp_path / "rows.jsonl", row))
    assert corpus.text == "user: one?\n\nof these\nassistant: fish"


def test_a_template_writes_the_special_tokens_itself(tmp_path, chatting):
    corpus = for_model(read_corpus(write(tmp_path / "rows.jsonl", ROWS["messages"])), chatting)
    asked = []

    def seen(text, **options):
        asked.append(options["add_special_tokens"])
        return chatting(text, **options)

    ids = tokenise(corpus, seen, VOCAB_SIZE)
    assert ids.tolist() == chatting(WRITTEN, add_special_tokens=False)["input_ids"]
    tokenise(corpus_from_text("text", "one fish"), seen, VOCAB_SIZE)
    assert asked == [False, True]


def test_without_a_template_turns_are_plain_text_and_that_is_said(tmp_path, tokenizer):
    corpus = for_model(read_corpus(write(tmp_path / "rows.jsonl", ROWS["messages"])), tokenizer)
    assert corpus.text == ASKED
    assert "no chat template" in corpus.notices[0]


def test_windows_of_conversations_know_the_text_as_used(tmp_path, chatting):
    source = write(tmp_path / "rows.jsonl", *[ROWS["messages"]] * 40)
    spec = WindowSpec(source, source, 64, 32, 16)
    calibration, evaluation = make_windows(spec, chatting, VOCAB_SIZE)
    ids = chatting(40 * WRITTEN, add_special_tokens=False)["input_ids"]
    assert evaluation.ids.flatten().tolist() == ids[:32]
    assert calibration.ids.flatten().tolist() == ids[32:96]
    assert evaluation.sha256 == sha256_of_text(40 * WRITTEN)


def test_the_date_in_a_template_is_the_same_every_day(tmp_path, tokenizer):
    corpus = read_corpus(write(tmp_path / "rows.jsonl", ROWS["messages"]))
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "\n{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string }}\n"
        "{{ strftime_now('%-d %B %y, %A %H:%M') }}"
    )
    assert for_model(corpus, dated).text == "\n26 Jul 2024\n26 July 24, Friday 00:00"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}", "{% for %}"]
)
def test_a_template_that_fails_is_told_of(tmp_path, tokenizer, template):
    corpus = read_corpus(write(tmp_path / "rows.jsonl", ROWS["messages"]))
    faulty = copy.deepcopy(tokenizer)
    faulty.chat_template = template
    with pytest.raises(TransActError, match="chat template fails on conversation 1 of"):
        for_model(corpus, faulty)


def test_a_column_of_text_comes_before_turns_and_one_may_be_named(tmp_path, chatting):
    row = {"text": "as text", **ROWS["messages"], "prompt": "a prompt"}
    source = write(tmp_path / "rows.jsonl", row)
    assert read_corpus(source).text == "as text"
    assert read_corpus(f"{source}:prompt").text == "a prompt"
    assert for_model(read_corpus(f"{source}:messages"), chatting).text == WRITTEN


def test_turns_from_windows_are_the_same_text(tmp_path, chatting):
    row = {"messages": [{"role": "user", "content": "\ufeffone\r\nfish"}]}
    corpus = for_model(read_corpus(write(tmp_path / "rows.jsonl", row)), chatting)
    assert corpus.text == "<s>[user] one\nfish\n"
    assert "carriage returns" in corpus.notices[0]


def test_rows_without_a_conversation_are_passed_over(tmp_path):
    rows = [{"messages": []}, {"messages": None}, ROWS["messages"]]
    assert read_corpus(write(tmp_path / "rows.jsonl", *rows)).text == ASKED
    rows = [{"prompt": None, "completion": "a"}, ROWS["completion"]]
    assert read_corpus(write(tmp_path / "rows.jsonl", *rows)).text == ASKED


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"messages": [{"role": "user"}]}], "without a role and text"),
        ([{"messages": [{"content": "a"}]}], "without a role and text"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}],
            "without a role and text",
        ),
        ([{"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}], "without a role"),
        ([{"messages": ["one?"]}], "holds list where text is expected"),
        ([{"prompt": 1, "completion": "a"}], "holds int where text is expected"),
        ([{"prompt": ["a"], "completion": "a"}], "holds str where a turn is expected"),
        ([ROWS["messages"], {"text": "a"}], "mixes rows of text and conversations"),
        ([{"question": "a"}], "no column named .* adding :COLUMN"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(tmp_path, rows, complaint):
    with pytest.raises(TransActError, match=complaint):
        read_corpus(write(tmp_path / "rows.jsonl", *rows))


def test_a_conversation_of_gigabytes_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("transact_core.data.corpus.MAX_GROUP_BYTES", 10)
    source = write(tmp_path / "rows.parquet", ROWS["messages"])
    with pytest.raises(TransActError, match="in one row group"):
        read_corpus(source)


def test_no_more_is_read_than_is_used(tmp_path, monkeypatch, chatting):
    monkeypatch.setattr("transact_core.data.corpus.MAX_CHARACTERS", 100)
    corpus = read_corpus(write(tmp_path / "rows.jsonl", *[ROWS["messages"]] * 40))
    assert len(corpus.conversations) < 10
    written = for_model(corpus, chatting)
    assert len(written.text) == 100
    assert any("first 100 characters" in notice for notice in written.notices)
