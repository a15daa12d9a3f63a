"""The live view of the Compress page: two sliders and the bars of every layer's width, and pictures
and figures that follow them.

The page sends tables for all slider positions once, so the browser needs nothing from Python while
a slider is dragged. When the slider rests, the browser sends its position back, and Python draws
the rest of the page for it. The JavaScript files are joined here into one module, because Streamlit
serves the files of a component only from an installed package.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from plotly.colors import sample_colorscale

from pages.charts.common import COLOURS, MAGNITUDE
from pages.live.packed import text_of_bytes
from pages.live.skyline import by_hand_of
from transact_core.models.architecture import DTYPE_BYTES, Architecture
from transact_core.models.footprint import CONTEXT_LENGTH
from transact_core.planning.preview import POSITIONS, EnergyKept, Maps, Option, Side, Structure
from transact_core.planning.targets import Prediction
from transact_core.pruning.plan import ByHand, Granularity, Widths, head_counts

HERE = Path(__file__).parent
SCRIPTS = ("figures.js", "skyline.js", "pictures.js", "live.js")
"""Joined in this order into one module."""
KEY = "live"
"""Key of the component's state in Streamlit's session state."""
LONGEST_CONTEXT = 1 << 20
"""Longest context that the page computes costs for, in tokens."""
MOST_LISTED = 10
"""Up to this many possible numbers of heads are listed; more are described in words."""
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
    """The sliders' positions in per cent of the width removed, the context length in tokens, and
    the widths of single layers."""

    mha: int = 33
    mlp: int = 30
    context: int = CONTEXT_LENGTH
    heads: str = ""
    """The bars of the attention and of the MLP, as `pages.live.skyline` writes them; empty where
    layers are as the sliders say."""
    channels: str = ""

    @property
    def by_hand(self) -> ByHand:
        """The widths that the bars stand for; empty where there are none."""
        return by_hand_of(self.heads, self.channels)

    @classmethod
    def read(cls, given: dict[str, Any], otherwise: "Position") -> "Position":
        """From an address or from the browser; `otherwise` replaces missing or invalid values."""

        def number(name: str, least: int, most: int) -> int:
            try:
                value = int(given[name])
            except (KeyError, TypeError, ValueError):
                return getattr(otherwise, name)
            return value if least <= value <= most else getattr(otherwise, name)

        last = POSITIONS[-1]
        bars = {"heads": otherwise.heads, "channels": otherwise.channels}
        # A link that says where the sliders are has no bars but those that it names.
        if {"mha", "mlp", *bars} & set(given):
            bars = {name: str(given.get(name, "")) for name in bars}
        if not by_hand_of(**bars):
            bars = dict.fromkeys(bars, "")
        return cls(
            number("mha", 0, last),
            number("mlp", 0, last),
            number("context", 1, LONGEST_CONTEXT),
            **bars,
        )


@dataclass(frozen=True)
class Measured:
    """A measured point, at the indices of the MHA and the MLP option that it was asked for by, or
    with the bars of its layers."""

    mha: int | None
    mlp: int | None
    ratio: float
    """Perplexity as a multiple of the dense model's."""
    low: float | None = None
    high: float | None = None
    """Ends of the ratio's 95 % interval; None for a single evaluation window."""
    heads: str = ""
    channels: str = ""


@dataclass(frozen=True)
class Decided:
    """The widths that an allocation chose at a position of the sliders."""

    mha: int
    mlp: int
    heads: str
    channels: str


@dataclass(frozen=True)
class Pricing:
    """What is said of measuring what each layer's cut loses, while that is not known."""

    words: str = ""
    busy: bool = False


def tables(
    architecture: Architecture,
    structures: Sequence[Structure],
    maps: Maps | None,
    energy: EnergyKept | None,
    save_dtype: str,
    bars: dict[str, Any],
) -> dict[str, Any]:
    """The data that depend on the choices but not on the position.

    With `auto` there is one structure for each granularity that it may take; maps and energy belong
    to the first. `bars` are those of `skyline.bar_tables`.
    """
    first = structures[0]
    return {
        "layers": architecture.num_hidden_layers,
        "hidden": architecture.hidden_size,
        "heads": architecture.num_attention_heads,
        "layer_parameters": architecture.layer_parameters(0),
        "dense": asdict(first.dense),
        "mha": [_mha(table, architecture) for table in structures],
        "mlp": _mlp(first, architecture),
        "saved_bytes": DTYPE_BYTES[save_dtype],
        "serving": f"Memory to serve is weights plus KV cache in {save_dtype}, the dtype that a "
        "cut is saved in. It leaves out activations and what the runtime itself needs.",
        "undecided": "auto takes one of these when the cut is measured.",
        "heads_caption": "Heads: all are kept, each is narrower"
        if first.granularity == "head-dims" and len(structures) == 1
        else "Heads, by index: thin ones are removed"
        if len(structures) == 1
        else "Heads: auto has not decided",
        "maps": _maps(maps, energy),
        "skyline": bars,
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
            {"width": option.width, "saving": asdict(option.saving), "words": sentence}
            for option, sentence in zip(side.options, words, strict=True)
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
    """The possible numbers of query heads in words; all are multiples of the first."""
    if len(counts) <= MOST_LISTED:
        return f"Possible here: {', '.join(map(str, counts))}."
    if counts[0] == 1:
        return f"Possible here: any number up to {counts[-1]}."
    return f"Possible here: every multiple of {counts[0]} up to {counts[-1]}."


def _mlp(table: Structure, architecture: Architecture) -> dict[str, Any]:
    dense = architecture.intermediate_size

    def words(option: Option) -> str:
        return f"{option.width:,} of {dense:,} channels stay in each layer."

    return {"possible": "", **_options(table.mlp, [words(option) for option in table.mlp.options])}


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
        "heads": text_of_bytes(maps.heads.in_bytes()),
        "heads_scale": maps.heads.scale,
        "stays_until": text_of_bytes(maps.stays_until.astype(np.uint8).tobytes()),
        "channels": text_of_bytes(maps.ranked_channels.in_bytes()),
        "channels_scale": maps.ranked_channels.scale,
        "energy_mha": _two_bytes(energy.mha),
        "energy_mlp": _two_bytes(energy.mlp),
    }


def _two_bytes(shares: np.ndarray) -> str:
    """Shares from 0 to 1 as base64 of 16-bit integers; figures.js reads them."""
    return text_of_bytes(np.round(shares * 65535).astype("<u2").tobytes())


def predicted(table: Structure, prediction: Prediction) -> dict[str, list[list[float | None]]]:
    """Predicted ratios by MHA option (rows) and MLP option, None where nothing is predicted."""
    rows = [
        [prediction.get((mha.width, mlp.width)) for mlp in table.mlp.options]
        for mha in table.mha.options
    ]
    return {
        name: [[ratio and round(getattr(ratio, name), 4) for ratio in row] for row in rows]
        for name in ("low", "mid", "high")
    }


NOT_PRICED = Pricing()


def nothing() -> None:
    """What is called where a page does not listen."""


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
    decided: Decided | None = None,
    prices: dict[str, Any] | None = None,
    pricing: Pricing = NOT_PRICED,
    filling: bool = False,
    on_change: Callable[[], None] = nothing,
    on_fill: Callable[[], None] = nothing,
    on_price: Callable[[], None] = nothing,
) -> Position:
    """Draws the live view and returns the position of its sliders.

    A new `revision` moves the sliders to `start`; otherwise they stay where they are. When one
    argument changes, all are sent to the browser again, so they should change seldom. `prices` are
    those of `skyline.price_tables`. `on_fill` and `on_price` are called when their buttons are
    pressed, after the browser has sent its position.
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
            "measured": [asdict(point) for point in measured],
            "waiting": waiting,
            "unpredicted": unpredicted,
            "unpredicted_by_hand": "predicted once the prices of layers are measured",
            "decided": decided and asdict(decided),
            "prices": prices,
            "pricing": asdict(pricing),
            "filling": filling,
        },
        on_view_change=on_change,
        on_fill_change=on_fill,
        on_price_change=on_price,
    )
    return position_of(result.get("view"), start, revision)


def position_of(view: Any, start: Position, revision: int) -> Position:
    """The position that the browser last sent, or `start` if that was for another revision."""
    if not isinstance(view, dict) or view.get("revision") != revision:
        return start
    return Position.read(view, start)
