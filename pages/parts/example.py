"""The worked example of the start page, as `scripts.record_example` recorded it.

The classes hold what the page shows, under the names of what was recorded. They are kept apart from
the engine's own, which bring torch with them: this page is drawn before torch is imported.
"""

from dataclasses import asdict
from functools import cache
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict

from transact_core.models.architecture import Architecture
from transact_core.models.footprint import Footprint
from transact_core.planning.law import Ratio

FILE = Path(__file__).parents[2] / "assets" / "example.json"


class Recorded(BaseModel):
    """Frozen data, made from the file or from the engine's objects that have the same fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, from_attributes=True)


class Environment(Recorded):
    """What the numbers were computed with; a part of `export.compression.Environment`."""

    device: str
    dtype: str
    threads: int
    cpu_capability: str
    packages: dict[str, str]


class ModelReference(Recorded):
    source: str
    weight_files: dict[str, str]
    """SHA-256 of each file, by its name."""


class TextReference(Recorded):
    source: str
    sha256: str
    tokens: int


class PlanChoices(Recorded):
    """What charts look at of a plan."""

    mha_ratio: float
    mlp_ratio: float
    granularity: str
    importance: str


class Decided(Recorded):
    """What charts look at of a decision; files from before there were other widths have none."""

    widths: str = "uniform"


class Point(Recorded):
    """What charts look at of a `bench.Measurement`, under the same names."""

    plan: PlanChoices
    decision: Decided = Decided()
    recovery: str
    footprint: Footprint
    perplexity: float
    delta_nll: float
    delta_nll_se: float
    seconds: float

    def row(self) -> dict[str, float]:
        """A row of `points.csv`, as `Measurement.row` gives it."""
        return {
            "mha_ratio": self.plan.mha_ratio,
            "mlp_ratio": self.plan.mlp_ratio,
            "perplexity": self.perplexity,
            **asdict(self.footprint),
            "delta_nll": self.delta_nll,
            "delta_nll_se": self.delta_nll_se,
            "seconds": self.seconds,
        }


class Dense(Recorded):
    footprint: Footprint
    perplexity: float


class Concentration(Recorded):
    """For each layer, the share of channels that holds `share` of the activation energy."""

    share: float
    mha: tuple[float, ...]
    mlp: tuple[float, ...]


class Example(Recorded):
    """One cut of the built-in model, and the points around it."""

    recorded: AwareDatetime
    command: str
    processor: str
    cores: int
    environment: Environment
    name: str
    """Of the model."""
    model: ModelReference
    architecture: Architecture
    text: str
    """In words."""
    calibration: TextReference
    evaluation: TextReference
    sequence_length: int
    scored_tokens: int
    concentration: Concentration
    asked: dict[str, bool | int | float | str]
    """The example's cut, by the names of the fields of `pages.server.request.Cut`."""
    left: Architecture
    """What the cut leaves of the architecture."""
    dense: Dense
    predicted: Ratio
    """Of that cut, from the points that cut one module alone."""
    cut: Point
    bare: Point
    """The same cut without its repair."""
    points: tuple[Point, ...]
    """The curve, the example's cut among them."""

    @property
    def address(self) -> dict[str, object]:
        """The query that opens the Compress page with the example's cut."""
        asked = dict(self.asked)
        ratios = {side: round(100 * asked.pop(f"{side}_ratio")) for side in ("mha", "mlp")}
        return ratios | asked


@cache
def example() -> Example:
    return Example.model_validate_json(FILE.read_bytes())
