"""Mixes, texts by the model, and texts of any length for training."""

import pytest
import torch

from tests.conftest import VOCAB_SIZE
from transact_core.base.errors import TransActError
from transact_core.data import corpus as corpora
from transact_core.data.corpus import mixed_sources, read_corpora, read_corpus, texts_of
from transact_core.data.packing import open_sources, pack
from transact_core.data.windows import (
    WindowSpec,
    deal,
    evaluation_windows,
    make_windows,
    read_texts,
    tokenise,
)


@pytest.fixture
def files(tmp_path):
    text = read_corpus("builtin").text
    for index, name in enumerate(("one.txt", "two.txt", "with+plus.txt")):
        (tmp_path / name).write_text(text[index * 3000 : (index + 1) * 3000])
    return [str(tmp_path / name) for name in ("one.txt", "two.txt", "with+plus.txt")]


def ids_of(source, tokenizer):
    return tokenise(read_corpus(source), tokenizer, VOCAB_SIZE)


def test_a_file_may_have_a_plus_sign_in_its_name(files):
    one, two, plus = files
    assert mixed_sources(f"{one}+{plus}+builtin") == (one, plus, "builtin")
    assert mixed_sources(plus) == (plus,)
    assert [text.source for text in texts_of(read_corpus(f"{plus}+{two}"))] == [plus, two]


def test_windows_of_a_mix_are_dealt_in_turn(files, tokenizer):
    one, two, _ = files
    windows = evaluation_windows(read_corpus(f"{one}+{two}"), tokenizer, VOCAB_SIZE, 100, 20)
    first, second = ids_of(one, tokenizer), ids_of(two, tokenizer)
    expected = [first[:20], second[:20], first[20:40], second[20:40], first[40:60]]
    assert torch.equal(windows.ids, torch.stack(expected))
    assert [(use.source, use.tokens) for use in windows.uses] == [(one, 60), (two, 40)]


@pytest.mark.parametrize(
    ("available", "wanted", "dealt"),
    [
        ([2, 2], 3, [(0, 0), (1, 0), (0, 1)]),
        ([1, 3], 4, [(0, 0), (1, 0), (1, 1), (1, 2)]),
        ([1, 1], 9, [(0, 0), (1, 0)]),
    ],
)
def test_a_short_text_leaves_its_share_to_the_others(available, wanted, dealt):
    assert deal(available, wanted) == dealt


def test_calibration_leaves_out_what_evaluation_takes_of_each_text(files, tokenizer):
    one, two, _ = files
    spec = WindowSpec(f"{one}+{two}", two, 80, 60, 20)
    calibration, evaluation = make_windows(spec, tokenizer, VOCAB_SIZE)
    first, second = ids_of(one, tokenizer), ids_of(two, tokenizer)
    assert torch.equal(evaluation.ids.flatten(), second[:60])
    expected = [first[:20], second[60:80], first[20:40], second[80:100]]
    assert torch.equal(calibration.ids, torch.stack(expected))
    assert [use.skipped for use in calibration.uses] == [0, 60]


def test_the_same_text_twice_is_refused(files):
    with pytest.raises(TransActError, match="named once"):
        read_corpus(f"{files[0]}+{files[1]}+{files[0]}")


@pytest.mark.parametrize(
    "source", ["generated:x", "generated:8:", "generated:1", "generated:9:0:x"]
)
def test_generated_is_refused_where_it_is_not_of_the_form(source):
    with pytest.raises(TransActError, match=r"generated|asks for"):
        read_corpus(source)


def test_a_text_that_nobody_has_written_gives_no_windows(tokenizer):
    texts = read_texts(WindowSpec("builtin", "generated:64:1"))
    assert texts[1].to_write.seed == 1
    with pytest.raises(TransActError, match="written by a model"):
        make_windows(WindowSpec("builtin", "generated:64:1"), tokenizer, VOCAB_SIZE, texts=texts)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_what_is_behind_the_longest_text_is_read_piece_by_piece(
    tmp_path, monkeypatch, tokenizer, kind
):
    monkeypatch.setattr(corpora, "MAX_CHARACTERS", 500)
    words = [f"word{number} of this text" for number in range(400)]
    path = tmp_path / f"long.{kind}"
    if kind == "txt":
        path.write_text("\n".join(words))
    else:
        path.write_text("\n".join(f'{{"text": "{line}"}}' for line in words))
    pieces = list(read_corpora(str(path)))
    assert len(pieces) > 10
    assert pieces[0].text == read_corpus(str(path)).text
    joined = " ".join(piece.text for piece in pieces)
    missing = [word for word in words if word.split()[0] not in joined.split()]
    # A row, or a word, that goes over the end of a piece may be cut in two there.
    assert len(missing) <= len(pieces)
    windows = pack(open_sources(str(path)), tokenizer, VOCAB_SIZE, 3200, 32)
    assert windows.tokens == 3200
    assert windows.tokens > 2 * len(tokenise(pieces[0], tokenizer, VOCAB_SIZE))


def test_packing_leaves_out_what_is_used_and_deals_evenly(files, tokenizer):
    one, two, _ = files
    used = {read_corpus(two).sha256: 50}
    windows = pack(open_sources(f"{one}+{two}"), tokenizer, VOCAB_SIZE, 80, 20, used)
    first, second = ids_of(one, tokenizer), ids_of(two, tokenizer)
    expected = [first[:20], second[50:70], first[20:40], second[70:90]]
    assert torch.equal(windows.ids.long(), torch.stack(expected))
    assert [(use.skipped, use.tokens) for use in windows.uses] == [(0, 40), (50, 40)]


def test_packing_says_where_the_text_ends_before_its_time(files, tokenizer):
    windows = pack(open_sources(files[0]), tokenizer, VOCAB_SIZE, 10**6, 20)
    assert windows.tokens == len(ids_of(files[0], tokenizer)) // 20 * 20
    assert "read again" in windows.notices[-1]
