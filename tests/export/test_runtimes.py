"""What is said of other runtimes before a cut is that of the model it makes."""

import pytest

from tests.conftest import make_model
from tests.models.families.made import make_member
from transact_core.experiments.bench import Choices
from transact_core.export.runtimes import CTRANSLATE2, LLAMA_CPP, readings, readings_of_cut
from transact_core.pruning.plan import GRANULARITIES
from transact_core.pruning.surgery import prune


def outcomes(said) -> dict[str, str]:
    return {each.runtime: each.outcome for each in said}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.34, 0.5])
@pytest.mark.parametrize("with_biases", [False, True])
def test_it_is_known_before_the_cut(bench, granularity, ratio, with_biases):
    plan = bench.plan(ratio, 0.5, Choices(granularity=granularity))
    dense = bench.loaded
    said = readings_of_cut(plan, dense.architecture, dense.model.config, with_biases)
    config = prune(dense.model, plan, with_biases).config
    assert said == readings(config)


def test_the_classes_for_other_head_counts_have_their_own():
    config = make_member("mistral").config
    assert outcomes(readings(config)) == {LLAMA_CPP: "same", CTRANSLATE2: "same"}
    said = readings(config, unknown_token=False)
    assert outcomes(said) == {LLAMA_CPP: "same", CTRANSLATE2: "refused"}
    assert "whose tokenizer has no unknown token" in said[1].sentence
    said = readings(make_member("smollm3", attention_bias=True).config)
    assert outcomes(said) == {LLAMA_CPP: "refused", CTRANSLATE2: "refused"}
    assert "no biases" in said[0].sentence


def test_layers_that_do_not_rotate_are_read_where_llama_cpp_takes_them_to_be():
    said = [
        readings(make_member("smollm3", num_hidden_layers=4, no_rope_layers=rotated).config)[0]
        for rotated in ([1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1])
    ]
    assert [each.outcome for each in said] == ["same", "misread", "misread"]
    assert "no rotary embedding in every fourth layer" in said[1].sentence


def test_each_kind_of_cut_has_its_own(gqa_bench):
    dense = gqa_bench.loaded

    def said(granularity: str, ratio: float) -> dict[str, str]:
        plan = gqa_bench.plan(ratio, 0.5, Choices(granularity=granularity))
        return outcomes(readings_of_cut(plan, dense.architecture, dense.model.config))

    both = {LLAMA_CPP: "same", CTRANSLATE2: "same"}
    assert said("query-heads", 0.0) == both
    assert said("query-heads", 0.5) == both | {CTRANSLATE2: "misread"}
    assert said("kv-groups", 0.5) == both | {CTRANSLATE2: "refused"}
    assert said("head-dims", 0.5) == {LLAMA_CPP: "misread", CTRANSLATE2: "refused"}


def test_frequencies_of_llama_3_are_named():
    config = make_model(num_attention_heads=6).config
    config.rope_parameters = {**config.rope_parameters, "rope_type": "llama3"}
    (_, reading) = readings(config)
    assert "misreads it without a word: it does not find the frequencies" in reading.sentence


def test_sliding_windows_are_named():
    said = readings(make_member("mistral, sliding").config)
    assert [each.outcome for each in said] == ["misread", "refused"]
    assert all("texts of more than 5 tokens" in each.sentence for each in said)


def test_what_was_not_tried_is_not_claimed():
    said = readings(make_member("phi3").config)
    assert [each.outcome for each in said] == ["unknown", "unknown"]
    assert all("was not tried: no cut of a Phi-3 model" in each.sentence for each in said)
