"""What is said of other runtimes before a cut is that of the model it makes."""

import pytest

from tests.conftest import make_model
from transact_core.experiments.bench import Choices
from transact_core.export.runtimes import CTRANSLATE2, LLAMA_CPP, readings, readings_of_cut
from transact_core.models.architecture import Architecture
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
    rope_type = config.rope_parameters["rope_type"]
    assert said == readings(Architecture.from_config(config), rope_type, config.model_type)


def test_the_classes_for_other_head_counts_have_their_own():
    shape = Architecture.from_config(make_model(num_attention_heads=6).config)
    assert outcomes(readings(shape, "default", "mistral")) == {
        LLAMA_CPP: "same",
        CTRANSLATE2: "refused",
    }
    biased = Architecture.from_config(make_model(attention_bias=True).config)
    said = readings(biased, "default", "smollm3")
    assert outcomes(said) == {LLAMA_CPP: "refused", CTRANSLATE2: "refused"}
    assert "no biases" in said[0].sentence


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
    shape = Architecture.from_config(make_model().config)
    (_, reading) = readings(shape, "llama3")
    assert "misreads it without a word: it does not find the frequencies" in reading.sentence
