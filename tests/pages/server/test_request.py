"""What a page asks for, and how it is named."""

import json
from dataclasses import asdict, fields, replace

import pytest

from pages.server.request import Cut, choices_in_name
from transact_core.experiments.bench import Choices

CHANGED = {
    "granularity": "head-dims",
    "importance": "taylor",
    "recovery": "bias",
    "multiple_of": 8,
    "head_dim_multiple_of": 8,
    "steps": 8,
    "sequential": True,
    "widths": "allocated",
    "keep_layers": (0, 29),
    "by_hand": ((6, 40), (3, 20)),
}
"""A value other than the usual one for each of the choices."""


def test_choices_that_differ_have_names_that_differ():
    assert set(CHANGED) == {field.name for field in fields(Choices)}
    named = [choices_in_name(replace(Choices(), **{name: CHANGED[name]})) for name in CHANGED]
    assert len({"", *named}) == len(CHANGED) + 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, ""),
        ({"sequential": True}, "-sequential"),
        ({"steps": 8}, "-steps-8"),
        ({"multiple_of": 8}, "-multiple-of-8"),
        ({"granularity": "head-dims", "recovery": "none"}, "-head-dims-none"),
    ],
)
def test_a_name_says_what_is_unusual(changes, name):
    assert choices_in_name(replace(Choices(), **changes)) == name


def test_a_cut_comes_back_from_json():
    cut = Cut(0.3, 0.2, widths="by-hand", by_hand=((6, 40), (3, 20)), keep_layers=(1,))
    stored = json.loads(json.dumps(asdict(cut)))
    assert Cut.from_json(stored) == cut
    # As cuts were stored before layers had widths of their own.
    older = {
        name: value for name, value in asdict(Cut()).items() if name[:4] not in ("by_h", "keep")
    }
    assert Cut.from_json(older) == Cut()


def test_another_granularity_gives_up_widths_by_hand():
    cut = Cut(widths="by-hand", by_hand=((6, 40), (3, 20)))
    assert cut.by("magnitude").by_hand == cut.by_hand
    assert cut.by("activation", "query-heads") == cut
    other = cut.by("magnitude", "kv-groups")
    assert (other.widths, other.by_hand, other.granularity) == ("uniform", (), "kv-groups")
