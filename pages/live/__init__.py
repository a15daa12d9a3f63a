"""The live view of the Compress page: two sliders, and pictures and figures that follow them.

The page sends its tables once; while a slider is dragged the browser asks nothing of Python. On
release the position is sent back and the rest of the page is drawn for it. The JavaScript files
are one module, joined here, because Streamlit serves a component's files only from an installed
package.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from plotly.colors import sample_colorscale

from pages.charts.common import COLOURS, MAGNITUDE
from transact_core.models.architecture import DTYPE_BYTES, Architecture
from transact_core.models.footprint import CONTEXT_LENGTH
from transact_core.planning.preview import POSITIONS, EnergyKept, Maps, Option, Side, Structure
from transact_core.planning.targets import Prediction
from transact_core.pruning.plan import Granularity, Widths, head_counts

HERE = Path(__file__).parent
SCRIPTS = ("figures.js", "pictures.js", "live.js")
KEY = "live"
"""Key of the component's state in the session."""
LONGEST_CONTEXT = 1 << 20
"""The most tokens of context that the page computes costs for."""
MOST_LISTED = 10
"""More numbers of heads than this are described, not listed."""
PRESETS = (
    {"name": "Gentle 20 / 20", "mha": 20, "mlp": 20},
    {"name": "The first picture's 33 / 30", "mha": 33, "mlp": 30},
    {"name": "A third of the heads", "mha": 33, "mlp": 0},
    {"name": "Half the MLP", "mha": 0, "mlp": 50},
    {"name": "Half of both", "mha": 50, "mlp": 50},
)

_mount = st.components.v2.component(
    "transact-live",
    html=(HERE / "live.html").read_text(),
    css=(HERE / "live.css").read_text(),
    js="\n".join((HERE / name).read_text() for name in SCRIPTS),
)


@dataclass(frozen=True)
class Position:
    """Where the sliders are, in per cent removed, and the context length in tokens."""

    mha: int = 33
    mlp: int = 30
    context: int = CONTEXT_LENGTH

    @classmethod
    def read(cls, given: dict[str, Any], otherwise: "Position") -> "Position":
        """From an address or a browser; invalid or missing values are taken from `otherwise`."""

        def number(name: str, least: int, most: int) -> int:
            try:
                value = int(given[name])
            except (KeyError, TypeError, ValueError):
                return getattr(otherwise, name)
            return value if least <= value <= most else getattr(otherwise, name)

        last = POSITIONS[-1]
        return cls(
            number("mha", 0, last), number("mlp", 0, last), number("context", 1, LONGEST_CONTEXT)
        )


@dataclass(frozen=True)
class Measured:
    """A measured point at the widths of two options."""

    mha: int
    mlp: int
    ratio: float
    """Its perplexity as a multiple of the dense model's."""
    low: float | None = None
    high: float | None = None
    """Ends of the ratio's 95 % interval; None where there is none."""


def tables(
    architecture: Architecture,
    structures: Sequence[Structure],
    maps: Maps | None,
    energy: EnergyKept | None,
    save_dtype: str,
) -> dict[str, Any]:
    """The data that change only with the choices, not with the position.

    There are several structures where `auto` has not chosen; maps and energy are of the first.
    """
    first = structures[0]
    return {
        "layers": architecture.num_hidden_layers,
        "hidden": architecture.hidden_size,
        "heads": architecture.num_attention_heads,
        "layer_parameters": architecture.layer_parameters(0),
        "dense": asdict(first.dense),
        "mha": [_mha(each, architecture) for each in structures],
        "mlp": _mlp(first, architecture),
        "saved_bytes": DTYPE_BYTES[save_dtype],
        "serving": f"Memory to serve is weights and KV cache in {save_dtype}, as a cut is saved. "
        "It leaves out activations and what a runtime itself takes.",
        "undecided": "auto decides among these when the cut is measured.",
        "heads_caption": "Heads: all stay, each is narrower"
        if first.granularity == "head-dims" and len(structures) == 1
        else "Heads, by index: thin ones go"
        if len(structures) == 1
        else "Heads: auto has not decided",
        "maps": _maps(maps, energy),
        "colours": {
            **COLOURS,
            "ramp": [
                "#" + "".join(f"{round(255 * part):02x}" for part in colour)
                for colour in sample_colorscale(MAGNITUDE, 64, colortype="tuple")
            ],
        },
        "presets": PRESETS,
    }


def _options(side: Side, words: Sequence[str]) -> dict[str, Any]:
    return {
        "options": [
            {"width": option.width, "saving": asdict(option.saving), "words": each}
            for option, each in zip(side.options, words, strict=True)
        ],
        "option_at": side.option_at,
    }


def _mha(table: Structure, architecture: Architecture) -> dict[str, Any]:
    words = [
        heads_in_words(option.widths, table.granularity, architecture)
        for option in table.mha.options
    ]
    if table.granularity == "head-dims":
        possible = "Possible: any even number."
    else:
        possible = _possible_heads(head_counts(architecture, table.granularity))
    return {
        "granularity": table.granularity,
        "possible": possible,
        **_options(table.mha, words),
    }


def _possible_heads(counts: Sequence[int]) -> str:
    """The numbers of query heads that can be kept, in words; they are multiples of the first."""
    if len(counts) <= MOST_LISTED:
        return f"Possible here: {', '.join(map(str, counts))}."
    if counts[0] == 1:
        return f"Possible here: any number up to {counts[-1]}."
    return f"Possible here: every multiple of {counts[0]} up to {counts[-1]}."


def _mlp(table: Structure, architecture: Architecture) -> dict[str, Any]:
    dense = architecture.intermediate_size

    def words(option: Option) -> str:
        return f"{option.width:,} of {dense:,} channels stay in each layer."

    return {"possible": "", **_options(table.mlp, [words(each) for each in table.mlp.options])}


def heads_in_words(widths: Widths, granularity: Granularity, architecture: Architecture) -> str:
    """One sentence on which heads and dims stay."""
    if granularity == "head-dims":
        kept = widths.head_dim or architecture.head_dim
        return (
            f"Every head keeps {kept} of {architecture.head_dim} dims, "
            f"{kept // 2} of {architecture.head_dim // 2} rotary pairs."
        )
    return (
        f"{widths.num_attention_heads} of {architecture.num_attention_heads} query heads stay, "
        f"over {widths.num_key_value_heads} of {architecture.num_key_value_heads} KV heads."
    )


def _maps(maps: Maps | None, energy: EnergyKept | None) -> dict[str, Any] | None:
    if maps is None or energy is None:
        return None
    return {
        "heads": _text(maps.heads.in_bytes()),
        "heads_scale": maps.heads.scale,
        "stays_until": _text(maps.stays_until.astype(np.uint8).tobytes()),
        "channels": _text(maps.ranked_channels.in_bytes()),
        "channels_scale": maps.ranked_channels.scale,
        "energy_mha": _two_bytes(energy.mha),
        "energy_mlp": _two_bytes(energy.mlp),
    }


def _two_bytes(shares: np.ndarray) -> str:
    return _text(np.round(shares * 65535).astype("<u2").tobytes())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def predicted(table: Structure, prediction: Prediction) -> dict[str, list[list[float | None]]]:
    """A prediction by option of MHA and of MLP, None where there is no prediction."""
    rows = [
        [prediction.get((mha.width, mlp.width)) for mlp in table.mlp.options]
        for mha in table.mha.options
    ]
    return {
        name: [[each and round(getattr(each, name), 4) for each in row] for row in rows]
        for name in ("low", "mid", "high")
    }


def live(
    given: dict[str, Any],
    start: Position,
    revision: int,
    choices: dict[str, Any],
    dense_perplexity: float | None = None,
    prediction: dict[str, Any] | None = None,
    measured: Sequence[Measured] = (),
    waiting: str = "",
    unpredicted: str = "not predicted yet: measure a point",
    on_change: Any = None,
) -> Position:
    """Draws the view and returns the position of its sliders.

    The sliders are moved to `start` when `revision` is new, and otherwise stay where they are. All
    arguments are sent to the browser again when one changes, so they should change seldom.
    """
    result = _mount(
        key=KEY,
        data={
            **given,
            "start": {"revision": revision, **asdict(start)},
            "choices": choices,
            "dense_perplexity": dense_perplexity,
            "prediction": prediction,
            "interval": "in 9 of 10 cases",
            "measured": [asdict(each) for each in measured],
            "waiting": waiting,
            "unpredicted": unpredicted,
        },
        on_view_change=on_change or (lambda: None),
    )
    return position_of(result.get("view"), start, revision)


def position_of(view: Any, start: Position, revision: int) -> Position:
    """The position that the browser last sent, or `start` where it was for another revision."""
    if not isinstance(view, dict) or view.get("revision") != revision:
        return start
    return Position.read(view, start)
