"""The worked example of the start page, as `scripts.record_example` recorded it."""

from functools import cache
from pathlib import Path

from pydantic import AwareDatetime

from pages.server.request import Cut
from transact_core.experiments.bench import Measurement
from transact_core.export.compression import Environment, ModelReference, TextReference
from transact_core.models.architecture import Architecture
from transact_core.models.footprint import Footprint
from transact_core.planning.law import Ratio
from transact_core.pruning.plan import Data, Granularity

FILE = Path(__file__).parents[2] / "assets" / "example.json"


class Asked(Data):
    """What charts look at of a plan."""

    mha_ratio: float
    mlp_ratio: float
    granularity: Granularity
    importance: str


class Point(Data):
    """What charts look at of a `bench.Measurement`, under the same names."""

    plan: Asked
    recovery: str
    footprint: Footprint
    perplexity: float
    delta_nll: float
    delta_nll_se: float
    seconds: float

    row = Measurement.row


class Dense(Data):
    footprint: Footprint
    perplexity: float


class Concentration(Data):
    """For each layer, the share of channels that holds `share` of the activation energy."""

    share: float
    mha: tuple[float, ...]
    mlp: tuple[float, ...]


class Example(Data):
    """One cut of the built-in model, and the points around it."""

    recorded: AwareDatetime
    command: str
    processor: str
    cores: int
    environment: Environment
    name: str
    """The model's."""
    model: ModelReference
    architecture: Architecture
    text: str
    """In words."""
    calibration: TextReference
    evaluation: TextReference
    sequence_length: int
    scored_tokens: int
    concentration: Concentration
    asked: Cut
    """The example's cut, as the Compress page's controls say it."""
    left: Architecture
    """What it leaves of the architecture."""
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
        """What opens the Compress page with the example's cut."""
        asked = dict(vars(self.asked))
        ratios = {side: round(100 * asked.pop(f"{side}_ratio")) for side in ("mha", "mlp")}
        return ratios | asked


@cache
def example() -> Example:
    return Example.model_validate_json(FILE.read_bytes())
