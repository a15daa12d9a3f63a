from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pages.parts.marked_text import losses_of_pieces, marked, plain, scale


class Read(HTMLParser):
    """Text, tags and attributes of a document."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


TEXT = st.text() | st.sampled_from(
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;", "</div>", "'", '"']
)


@given(TEXT)
def test_plain_text_stays_text(text):
    read = Read(plain(text))
    assert read.tags == ["div"]
    assert read.text == text.replace("\r\n", "\n") or read.text == text


@given(st.lists(TEXT, min_size=2, max_size=6))
def test_tokens_stay_text(texts):
    losses = torch.linspace(0, 5, len(texts) - 1)
    table = losses_of_pieces([(text, 1) for text in texts], losses, losses.flip(0), 1)
    read = Read(marked(table))
    assert read.tags == ["div"] + ["span"] * (len(texts) - 1)
    assert read.text == "".join(texts[1:])
    for attributes in read.attributes[1:]:
        assert attributes.keys() == {"title", "style"}
        assert attributes["title"].endswith(" nats")


def test_losses_of_a_piece_are_those_of_its_tokens():
    pieces = [("a", 1), ("b", 1), ("é", 2), ("c", 1)]
    dense, pruned = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.5, 1, 3, 9])
    table = losses_of_pieces(pieces, dense, pruned, 1)
    assert table["token"].tolist() == ["b", "é", "c"]
    assert table["dense_nll"].tolist() == [1, 5, 4]
    assert table["change"].tolist() == [0.5, -1, 5]
    within = losses_of_pieces(pieces, dense, pruned, 3)
    assert within["token"].tolist() == ["é", "c"]
    assert within["dense_nll"].tolist() == [3, 4]
    assert losses_of_pieces(pieces, dense, pruned, 4)["token"].tolist() == ["c"]
    assert losses_of_pieces(pieces, dense, pruned, 5).empty


@pytest.mark.parametrize(
    ("pruned", "colour"), [(4.0, "213, 94, 0,0.60"), (-4.0, "0, 114, 178,0.60"), (0.0, ",0.00")]
)
def test_colours_tell_worse_from_better(pruned, colour):
    table = losses_of_pieces([("a", 1), ("b", 1)], torch.zeros(1), torch.tensor([pruned]), 1)
    assert f"{colour})" in marked(table)
    assert "same" in scale()
