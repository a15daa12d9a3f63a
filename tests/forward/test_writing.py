"""Text that a small random model writes."""

import pytest
import torch

from tests.conftest import KINDS, loaded_from, make_model
from transact_core.base.cache import evict
from transact_core.base.errors import TransActError
from transact_core.data.corpus import mix, read_corpus
from transact_core.data.windows import WindowSpec, read_texts
from transact_core.experiments.cut_spec import bench_with
from transact_core.forward import writing
from transact_core.forward.writing import generated_path, written

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"


@pytest.fixture
def loaded(tokenizer):
    return loaded_from(make_model(**KINDS["gqa-tied"], initializer_range=0.02), tokenizer)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(writing, "DOCUMENT_TOKENS", 24)
    monkeypatch.setattr(writing, "AT_ONCE", 4)


def test_it_is_written_once_and_then_read(loaded, monkeypatch):
    source = read_corpus("generated:100:7")
    first = written(source, loaded)
    assert len(loaded.tokenizer(first.text)["input_ids"]) > 50
    assert generated_path(source.to_write, loaded).read_text() == first.text
    monkeypatch.setattr(loaded.model, "generate", None)
    assert written(source, loaded) == first
    assert first.source == "generated:100:7"
    assert str(generated_path(source.to_write, loaded)) in first.notices[-1]


def test_the_seed_and_the_weights_decide(loaded, tokenizer, tmp_path, monkeypatch):
    first = written(read_corpus("generated:60:1"), loaded).text
    assert written(read_corpus("generated:60:2"), loaded).text != first
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    assert written(read_corpus("generated:60:1"), loaded).text == first
    other = loaded_from(make_model(**KINDS["gqa"]), tokenizer)
    assert written(read_corpus("generated:60:1"), other).text != first


def test_sampling_leaves_the_random_state_of_others_alone(loaded):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    written(read_corpus("generated:30:1"), loaded)
    assert torch.equal(torch.rand(2), expected)


def test_a_continuation_is_sampled_from_the_models_own_distribution(loaded):
    """The first tokens after one beginning, against their probabilities."""
    begins = [[5]] * 400
    made = writing._sampled(loaded, begins, 0, lambda tokens: None)
    counts = torch.bincount(torch.tensor([ids[1] for ids in made if len(ids) > 1]), minlength=320)
    with torch.no_grad():
        p = loaded.model(torch.tensor([[5]])).logits[0, -1].softmax(0)
    assert (counts / 400 - p).abs().max() < 0.1
    assert counts.gt(0).sum() > 20


def test_a_chat_model_answers_prompts_through_its_template(loaded, tokenizer, monkeypatch):
    with pytest.raises(TransActError, match="no"):
        written(read_corpus("generated:60:1:chat"), loaded)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    text = written(read_corpus("generated:200:1"), loaded)
    assert text.has_special_tokens
    assert "<s>user: " in text.text
    assert "<s>assistant: " in text.text
    plain = written(read_corpus("generated:200:1:plain"), loaded)
    assert "assistant" not in plain.text


def test_it_is_calibrated_on_and_stands_in_a_mix(loaded):
    spec = WindowSpec("builtin+generated:300:1", "builtin", 64, 32, 16)
    bench = bench_with(loaded, spec, read_texts(spec))
    assert [use.tokens for use in bench.calibration.uses] == [32, 32]
    assert bench.calibration.uses[0].skipped == 32
    text = written(read_corpus("generated:300:1"), loaded)
    assert bench.calibration.uses[1].sha256 == text.sha256
    assert bench.calibration.sha256 == mix([read_corpus("builtin"), text]).sha256


def test_kept_texts_are_part_of_the_caches_limit(loaded):
    text = read_corpus("generated:60:1")
    written(text, loaded)
    evict(10)
    assert not generated_path(text.to_write, loaded).exists()
