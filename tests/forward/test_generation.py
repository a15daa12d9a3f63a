import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import VOCAB_SIZE, make_model, make_tokenizer
from transact_core.base.errors import TransActError
from transact_core.forward.generation import (
    Sampling,
    Token,
    decode,
    encode_prompt,
    end_tokens,
    generate,
    in_turns,
    pieces,
    tokens_per_second,
)
from transact_core.forward.perplexity import evaluate, token_losses

PROMPT = [5, 9, 14, 200, 31]


def ids_of(tokens) -> list[int]:
    return [token.id for token in tokens]


def by_transformers(model, **settings) -> list[int]:
    torch.manual_seed(3)
    made = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, pad_token_id=1, top_k=0, **settings
    )
    return made[0, len(PROMPT) :].tolist()


def test_greedy_tokens_are_those_of_transformers(model):
    tokens = list(generate(model, PROMPT, 20, ends=end_tokens(model)))
    assert ids_of(tokens) == by_transformers(model, do_sample=False)
    assert all(token.seconds > 0 for token in tokens)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_drawn_tokens_are_those_of_transformers(gqa_model, top_p):
    sampling = Sampling(temperature=0.8, top_p=top_p, seed=3)
    tokens = generate(gqa_model, PROMPT, 20, sampling, end_tokens(gqa_model))
    expected = by_transformers(gqa_model, do_sample=True, temperature=0.8, top_p=top_p)
    assert ids_of(tokens) == expected


def test_it_ends_after_an_end_token(gqa_model):
    free = ids_of(generate(gqa_model, PROMPT, 20))
    end = free[4]
    stopped = ids_of(generate(gqa_model, PROMPT, 20, ends=frozenset([end])))
    assert stopped == free[: free.index(end) + 1]


def test_it_ends_where_the_context_is_full_and_refuses_what_does_not_fit():
    short = make_model(max_position_embeddings=8)
    assert len(list(generate(short, PROMPT, 20))) == 3
    with pytest.raises(TransActError, match="8 tokens and the model's context only 8; shorten"):
        next(generate(short, list(range(8)), 20))


def test_the_model_works_only_when_asked(gqa_model, monkeypatch):
    calls = []
    forward = gqa_model.forward
    monkeypatch.setattr(gqa_model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    stream = generate(gqa_model, PROMPT, 20)
    assert calls == []
    next(stream)
    next(stream)
    stream.close()
    assert len(calls) == 2


def test_streams_take_turns_until_all_have_ended():
    streams = {"a": iter([Token(1, 0.1)]), "b": iter([Token(2, 0.1), Token(3, 0.1)]), "c": iter([])}
    assert [(name, token.id) for name, token in in_turns(streams)] == [("a", 1), ("b", 2), ("b", 3)]


def test_the_pass_over_the_prompt_is_not_counted_as_decoding():
    assert tokens_per_second([Token(1, 50.0), Token(2, 0.5), Token(3, 0.5)]) == 2
    assert tokens_per_second([Token(1, 50.0)]) is None


def test_losses_of_a_text_are_those_of_the_evaluation(model, windows):
    measured = evaluate(model, windows[1])
    for window, losses in zip(windows[1].ids, measured.nll, strict=True):
        assert torch.equal(token_losses(model, window), losses)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), st.text(max_size=20))
def test_pieces_are_the_text_and_hold_every_token_once(tokenizer, ids, text):
    for each in (ids, tokenizer(text)["input_ids"]):
        found = pieces(tokenizer, each)
        assert sum(count for _, count in found) == len(each)
        assert all(count > 0 for _, count in found)
    assert "".join(piece for piece, _ in found) == decode(tokenizer, each, special=True) == text


def test_a_prompt_is_encoded_bare_or_as_a_turn(tokenizer):
    assert (
        encode_prompt(tokenizer, "hello", chat=False, vocab_size=VOCAB_SIZE)
        == tokenizer("hello")["input_ids"]
    )
    with pytest.raises(TransActError, match=r"cannot be applied .* switch it off"):
        encode_prompt(tokenizer, "hello", chat=True, vocab_size=VOCAB_SIZE)
    with pytest.raises(TransActError, match="empty"):
        encode_prompt(tokenizer, " \n", chat=False, vocab_size=VOCAB_SIZE)
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    try:
        tokenizer.chat_template = template
        ids = encode_prompt(tokenizer, "hello", chat=True, vocab_size=VOCAB_SIZE)
    finally:
        tokenizer.chat_template = None
    assert decode(tokenizer, ids, special=True) == "<s>hello</s>A:"
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("chat", [True, False])
def test_a_token_without_an_embedding_is_refused_in_a_sentence(chat):
    larger = make_tokenizer()
    larger.add_tokens(["<extra>"])
    larger.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert max(larger("an <extra> one")["input_ids"]) == VOCAB_SIZE
    with pytest.raises(TransActError, match=r"'<extra>' with the id 320.* ids 0 to 319 only"):
        encode_prompt(larger, "an <extra> one", chat, VOCAB_SIZE)
    assert encode_prompt(larger, "an ordinary one", chat, VOCAB_SIZE)


def test_a_token_that_only_the_chat_template_writes_is_refused_too():
    larger = make_tokenizer()
    larger.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    larger.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(TransActError, match=r"chat template has the token '<\|turn\|>'"):
        encode_prompt(larger, "hello", True, VOCAB_SIZE)


def test_a_chat_template_that_fails_in_its_own_way_is_refused_in_a_sentence():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(TransActError, match=r"cannot be applied .* switch it off"):
        encode_prompt(tokenizer, "hello", True, VOCAB_SIZE)


class Panic(BaseException):
    """As the tokenizers' panics are: no `Exception`."""


def test_a_tokenizer_that_panics_is_told_in_a_sentence():
    def panicking(*_, **__):
        raise Panic("index out of bounds")

    with pytest.raises(TransActError, match=r"cannot be split .*Panic: index out of bounds"):
        encode_prompt(panicking, "hello", False, VOCAB_SIZE)


def test_ids_that_the_tokenizer_does_not_know_are_no_text(tokenizer):
    # A model with a padded vocabulary can generate them.
    assert decode(tokenizer, [5, VOCAB_SIZE + 7]) == decode(tokenizer, [5])
    assert sum(count for _, count in pieces(tokenizer, [5, VOCAB_SIZE + 7, 6])) == 3
