"""What the README and the Method page say of each family is what the engine does."""

from pathlib import Path

import pytest

from tests.models.families.made import MEMBERS, make_member
from transact_core.base.errors import TransActError
from transact_core.models.families.allowed import biases, narrower_heads, table
from transact_core.models.families.table import FAMILIES
from transact_core.models.stock_class import require_biases
from transact_core.pruning.rope import require_narrowable

README = Path(__file__).parents[3] / "README.md"


def allows(check, *arguments) -> bool:
    try:
        check(*arguments)
    except TransActError:
        return False
    return True


def test_the_readme_has_the_table():
    assert table(list(FAMILIES.values())) in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_said_is_done(member):
    config = make_member(member).config
    family = FAMILIES[config.model_type]
    assert allows(require_narrowable, config) == (narrower_heads(family) == "yes")
    whole = family.bias_fields == ("attention_bias", "mlp_bias") or (
        "without a sliding window" in biases(family) and config.sliding_window is None
    )
    assert allows(require_biases, config, True, True) == whole


def test_a_window_that_is_long_enough_does_no_harm():
    config = make_member("mistral, sliding").config
    assert allows(require_narrowable, config, config.sliding_window)
    assert not allows(require_narrowable, config, config.sliding_window + 1)
