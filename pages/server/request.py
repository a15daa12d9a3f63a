"""What a page asks for: a request (model, texts, tokens) and a cut (the controls of Compress)."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from transact_core.base.files import sha256_of_text
from transact_core.data.corpus import BUILTIN_TEXTS
from transact_core.data.windows import WindowSpec
from transact_core.experiments.bench import Choices, Measurement
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.experiments.sweep import Pair
from transact_core.models.load import BUILTIN
from transact_core.pruning.plan import ByHand, Granularity, WidthsName

DIGEST_LENGTH = 8
"""Hexadecimal digits that tell folders of cuts by hand apart."""


@dataclass(frozen=True)
class Request:
    """Which model, which texts, how much of them."""

    model: str = BUILTIN
    device: str = "auto"
    dtype: str = "auto"
    calibration: str = WindowSpec.calibration
    evaluation: str = WindowSpec.evaluation
    calibration_tokens: int = WindowSpec.calibration_tokens
    evaluation_tokens: int = WindowSpec.evaluation_tokens
    sequence_length: int = WindowSpec.sequence_length
    others: tuple[str, ...] = WindowSpec.others

    @property
    def texts(self) -> list[str]:
        """Texts to offer where one is chosen: the evaluation texts, the built-in ones and, last,
        the calibration text; none twice."""
        offered = (self.evaluation, *self.others, *BUILTIN_TEXTS, self.calibration)
        return list(dict.fromkeys(offered))

    @property
    def model_key(self) -> tuple[str, str, str]:
        """Identifies a loaded model among others."""
        return self.model, self.device, self.dtype

    @property
    def bench_spec(self) -> BenchSpec:
        """The same as a value that a worker takes."""
        windows = WindowSpec(**{each.name: getattr(self, each.name) for each in fields(WindowSpec)})
        return BenchSpec(self.model, self.device, self.dtype, windows)


@dataclass(frozen=True)
class Cut:
    """A cut as the controls of the Compress page describe it."""

    mha_ratio: float = 0.33
    mlp_ratio: float = 0.3
    granularity: Granularity | Literal["auto"] = Choices.granularity
    importance: str = Choices.importance
    recovery: str = Choices.recovery
    steps: int = Choices.steps
    multiple_of: int = Choices.multiple_of
    sequential: bool = Choices.sequential
    head_dim_multiple_of: int = Choices.head_dim_multiple_of
    widths: WidthsName = Choices.widths
    keep_layers: tuple[int, ...] = Choices.keep_layers
    by_hand: ByHand = Choices.by_hand

    @property
    def ratios(self) -> Pair:
        return self.mha_ratio, self.mlp_ratio

    @property
    def allocates(self) -> bool:
        """Whether widths of their own are chosen for the layers, which takes measuring."""
        return self.widths in ("allocated", "traded")

    @property
    def of_controls(self) -> "Cut":
        """With uniform widths in place of those by hand, which no control can say."""
        return replace(self, widths="uniform", by_hand=()) if self.by_hand else self

    def by(self, importance: str, granularity: Granularity | None = None) -> "Cut":
        """Scored by another importance, and with another granularity where one is given; widths by
        hand are then given up, since they count what the old one leaves."""
        if granularity in (None, self.granularity):
            return replace(self, importance=importance)
        return replace(self.of_controls, importance=importance, granularity=granularity)

    @property
    def choices(self) -> Choices:
        return Choices(**{field.name: getattr(self, field.name) for field in fields(Choices)})

    @classmethod
    def of(cls, point: Measurement) -> "Cut":
        plan, decision = point.plan, point.decision
        return cls(
            plan.mha_ratio,
            plan.mlp_ratio,
            "auto" if decision.granularity_losses else plan.granularity,
            plan.importance,
            point.recovery,
            decision.steps,
            plan.multiple_of,
            decision.sequential,
            plan.head_dim_multiple_of,
            decision.widths,
            decision.keep_layers,
            decision.by_hand,
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Cut":
        """From what `json` makes of `asdict`; fields that were not there yet are as usual.

        Raises:
            TypeError: not such a dictionary.
        """
        lists = {
            "keep_layers": tuple(stored.get("keep_layers", ())),
            "by_hand": tuple(map(tuple, stored.get("by_hand", ()))),
        }
        return cls(**{**stored, **lists})


def layers_in_words(layers: tuple[int, ...]) -> str:
    """Numbers of layers with commas between them, as they are typed."""
    return ", ".join(map(str, layers))


def choices_in_name(choices: Choices) -> str:
    """The choices other than the usual ones, for a folder's name, as `-kv-groups-steps-8`."""
    parts = []
    for field in fields(Choices):
        value = getattr(choices, field.name)
        if value == field.default:
            continue
        words = field.name.replace("_", "-")
        if field.name == "by_hand":
            # The widths themselves would be too long.
            parts.append(sha256_of_text(repr(value))[:DIGEST_LENGTH])
            continue
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, tuple):
            parts.append("-".join([words, *map(str, value)]))
        else:
            parts.append(words if value is True else f"{words}-{value}")
    return "".join(f"-{part}" for part in parts)


def first_look(choices: Choices) -> Choices:
    """The choices that a plan is drawn with until `auto`, steps or sequential choices are decided:
    query heads, scored once."""
    granularity = choices.granularity if choices.granularity != "auto" else Choices.granularity
    return replace(choices.of_uniform, granularity=granularity, steps=1, sequential=False)


def what_to_learn(choices: Choices) -> Choices:
    """The choices that a prediction's measurements depend on; all others at their defaults."""
    if choices.granularity == "head-dims":
        return replace(
            choices.of_uniform, steps=1, multiple_of=1, head_dim_multiple_of=1, sequential=False
        )
    return Choices(importance=choices.importance)


def what_to_price(choices: Choices) -> Choices:
    """The choices that prices of single layers depend on; all others at their defaults."""
    return Choices(
        granularity=choices.granularity,
        importance=choices.importance,
        recovery=choices.recovery,
    )
