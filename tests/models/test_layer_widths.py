"""What a `config.json` says of single layers."""

import json

import pytest

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture, LayerWidths
from transact_core.models.layer_widths import FIELD, per_layer_config, separated, with_overrides
from transact_core.models.load import load_model

UNEVEN = (LayerWidths(6, 6, 40), LayerWidths(3, 3, 40), LayerWidths(6, 6, 8))
SHAPE = Architecture(48, 40, 3, 6, 6, 8, 320, False, False, False)


def test_what_is_written_is_read_again():
    uneven = SHAPE.with_layers(UNEVEN)
    rest, overrides = separated({"hidden_size": 48, FIELD: per_layer_config(uneven)})
    assert rest == {"hidden_size": 48}
    assert overrides == {
        1: {"num_attention_heads": 3, "num_key_value_heads": 3},
        2: {"intermediate_size": 8},
    }
    assert with_overrides(SHAPE, overrides) == uneven
    assert per_layer_config(SHAPE) == {}
    assert separated({"hidden_size": 48}) == ({"hidden_size": 48}, {})


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ({"7": {"intermediate_size": 8}}, "names layer 7"),
        ({"1": {"skip": ["mlp"]}}, "layer 1 sets skip"),
        ({"1": {"intermediate_size": 0}}, "intermediate_size is 0"),
        ({"1": {"intermediate_size": True}}, "is True"),
        ({"1": {"num_attention_heads": 5}}, "evenly"),
        ({"1": 3}, "no mapping of fields"),
        ({"first": {"intermediate_size": 8}}, "invalid literal"),
        ([8], "no mapping of layers"),
        ({"1": {"intermediate_size": 8}}, "has shape"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence(checkpoint, stored, complaint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {FIELD: stored}))
    with pytest.raises(TransActError, match=complaint):
        load_model(str(checkpoint))
