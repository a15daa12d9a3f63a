"""What a GGUF file would be, planned before any weight is read."""

import pytest

from tests.conftest import loaded_from, make_model
from transact_core.base.errors import TransActError
from transact_core.export.gguf import (
    default_multiples,
    describe,
    describe_model,
    plan_file,
    write_file,
)
from transact_core.export.gguf_types import QUANTIZATIONS, quantization
from transact_core.models.architecture import Architecture

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize("chosen", ["F32", "F16", "BF16"])
def test_the_size_told_before_is_the_files(chosen, tokenizer, tmp_path):
    loaded = loaded_from(make_model(tie_word_embeddings=True), tokenizer)
    plan = plan_file(describe(loaded), chosen)
    path = tmp_path / "x.gguf"
    write_file(path, plan, loaded.architecture, loaded.model.state_dict().__getitem__)
    assert path.stat().st_size == plan.bytes
    assert plan.fallbacks == ()


def test_widths_that_a_type_cannot_take_are_told_with_what_mends_them(tokenizer):
    def fallbacks(chosen, **changes):
        model = make_model(**WIDE | changes)
        return plan_file(describe(loaded_from(model, tokenizer)), chosen).fallbacks

    assert fallbacks("Q4_K_M") == ()
    (odd,) = fallbacks("Q4_0", intermediate_size=500)
    assert (odd.row, odd.wanted, odd.taken, odd.tensors) == (500, "Q4_0", "F16", 1)
    assert odd.mend == "--multiple-of 32"
    # 500 × 256 weights: 2 bytes each, where 18 bytes would hold 32 of them.
    assert odd.bytes_more == 500 * 256 * 2 - 500 * 256 * 18 // 32
    (narrow,) = fallbacks("Q8_0", intermediate_size=490)
    assert (narrow.taken, narrow.mend) == ("F16", "--multiple-of 32")
    narrow = fallbacks("Q4_K_M", intermediate_size=480)
    assert [(each.mend, each.taken) for each in narrow] == [("--multiple-of 256", "Q8_0")]
    hidden = fallbacks("Q4_K_M", hidden_size=288)
    assert {each.mend for each in hidden} == {None}
    assert all("mends" not in each.sentence for each in hidden)


def test_a_file_of_fewer_bits_is_smaller(tokenizer):
    description = describe(loaded_from(make_model(**WIDE), tokenizer))
    sizes = {name: plan_file(description, name).bytes for name in QUANTIZATIONS}
    order = ("F32", "F16", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q2_K")
    assert sorted(order, key=sizes.get, reverse=True) == list(order)


def test_the_default_multiple_is_the_largest_that_stays_near():
    dense = Architecture.from_config(make_model(**WIDE | {"intermediate_size": 1536}).config)
    assert default_multiples(dense, 1 / 3) == (256, 32)
    assert default_multiples(dense, 0.3) == (256, 32)
    assert default_multiples(dense, 0.25) == (32, 32)


def test_names_of_types_are_taken_in_any_case_and_others_refused():
    assert quantization(" q4_k_m ").name == "Q4_K_M"
    with pytest.raises(TransActError, match="choose one of F32"):
        quantization("Q4_K_XL")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("hidden_act", "gelu", "hidden_act is gelu"),
        ("sliding_window", 4096, "sliding_window is 4096"),
        (
            "rope_parameters",
            {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
            "depend on the length",
        ),
    ],
)
def test_what_a_llama_file_cannot_say_is_refused(field, value, complaint):
    config = make_model().config
    architecture = Architecture.from_config(config)
    object.__setattr__(config, field, value)
    with pytest.raises(TransActError, match=complaint):
        describe_model(config, architecture, (), "odd")
