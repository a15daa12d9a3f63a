"""The error of predicted perplexity: predictions beside later measurements.

    python -m benchmarks.prediction --calibration FILE --evaluation FILE \\
        --granularity kv-groups --importance fluctuation --recovery least-squares \\
        --output points.jsonl

The predictor chooses the first points itself, each after the one before was measured and the law
was fitted to it. Then positions over the whole useful range are measured and compared with their
predictions from the first points. Points are appended to the file as they are measured; points that
the file has already are not measured again, so an interrupted run continues. The constants of
`transact_core.planning.law` come from the built-in text, `activation` and `query-heads`: test them
on another text, importance and granularity.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.row import Setup, load
from transact_core.base.cache import ENGINE_VERSION
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.prediction import (
    USEFUL,
    Point,
    Scored,
    keep_score,
    next_points,
    predict_grid,
)
from transact_core.planning.law import Ratio
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES

Place = tuple[int, int]
"""(Attention width, MLP width), in channels."""


class Points:
    """Measured points of one bench and choices, kept in a file, one JSON object a line."""

    def __init__(self, bench: Bench, choices: Choices, path: Path) -> None:
        self.bench, self.choices, self.path = bench, choices, path
        made_by = {
            "model": bench.loaded.source,
            "calibration": bench.calibration.sha256,
            "calibration_tokens": bench.calibration.tokens,
            "evaluation": bench.evaluation.sha256,
            "evaluation_tokens": bench.evaluation.tokens,
            "sequence_length": bench.evaluation.sequence_length,
            "engine": ENGINE_VERSION,
            **asdict(choices),
        }
        # As it comes back from the file, which knows no tuples.
        self._key = json.loads(json.dumps(made_by))
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._known = {
            (row["mha_width"], row["mlp_width"]): row
            for row in rows
            if self._key.items() <= row.items()
        }

    def at(self, place: Place) -> Point:
        """The point at these widths, measured if it is not in the file."""
        if place not in self._known:
            shape = self.bench.loaded.architecture
            ratios = (1 - place[0] / shape.mha_width, 1 - place[1] / shape.intermediate_size)
            plan = self.bench.plan(*ratios, self.choices)
            measurement = compress(self.bench, plan, self.choices.recovery)[1]
            row = self._key | measurement.row()
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._known[place] = row
        row = self._known[place]
        print(f"{place}: {math.exp(row['delta_nll']):.3f} × dense", file=sys.stderr, flush=True)
        return Point(self.choices, *place, row["delta_nll"], row["delta_nll_se"])


def first_points(points: Points, count: int, limit: float) -> list[Point]:
    """Points at which the predictor, fitted to those before, would learn most; `count` at most."""
    found: list[Point] = []
    while len(found) < count:
        places = next_points(points.bench, points.choices, found, limit=limit)
        if not places:
            break
        found.append(points.at(places[0]))
    return found


def to_check(bench: Bench, choices: Choices, first: list[Point], count: int, limit: float):
    """Positions in the range predicted to be useful, evenly spaced by predicted perplexity."""
    taken = {(point.mha_width, point.mlp_width) for point in first}
    grid = predict_grid(bench, choices, first)
    useful = sorted(
        (ratio.mid, place)
        for place, ratio in grid.items()
        if 1 < ratio.mid <= limit and place not in taken
    )
    step = max(1, len(useful) // count)
    return [place for _, place in useful[step // 2 :: step]][:count]


def checked(bench: Bench, first: list[Point], later: list[Point]) -> list[Scored]:
    """The later points beside their predictions from the first ones."""
    found = []
    for point in later:
        place = (point.mha_width, point.mlp_width)
        predicted: Ratio = predict_grid(bench, point.choices, first, [place[0]], [place[1]])[place]
        found.append(Scored(point, predicted, math.exp(point.delta_nll)))
    return found


def left_out(bench: Bench, points: list[Point]) -> list[Scored]:
    """Leave-one-out: each point beside its prediction from all others."""
    return [
        score
        for index, point in enumerate(points)
        for score in checked(bench, points[:index] + points[index + 1 :], [point])
    ]


def table(scored: Sequence[Scored]) -> Iterator[str]:
    yield (
        "| attention width | MLP width | predicted (90 % interval) | measured | error "
        "| in the interval |"
    )
    yield "| ---: | ---: | ---: | ---: | ---: | --- |"
    for row in scored:
        yield (
            f"| {row.point.mha_width} | {row.point.mlp_width} | {row.predicted.mid:.3f} "
            f"({row.predicted.low:.3f} to {row.predicted.high:.3f}) | {row.measured:.3f} | "
            f"{row.relative_error:+.1%} | {'yes' if row.inside else 'no'} |"
        )


def summary(scored: Sequence[Scored], limit: float) -> str:
    """The errors of the points that measured at most `limit` times dense, in one line."""
    within = [row for row in scored if row.measured <= limit]
    if not within:
        return f"none was measured at up to {limit:g} × dense"
    sizes = [abs(row.relative_error) for row in within]
    return (
        f"{len(within)} points up to {limit:g} × dense: error at most {max(sizes):.1%}, median "
        f"{statistics.median(sizes):.1%}; {sum(row.inside for row in within)} in the interval"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prediction", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--calibration", default="builtin", metavar="SOURCE")
    parser.add_argument("--evaluation", default="builtin", metavar="SOURCE")
    parser.add_argument("--calibration-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--evaluation-tokens", type=int, default=2048, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="L")
    parser.add_argument("--granularity", choices=GRANULARITIES, default="query-heads")
    parser.add_argument("--importance", default="activation")
    parser.add_argument("--recovery", choices=RECOVERIES, default="least-squares")
    parser.add_argument("--first", type=int, default=5, metavar="N", help="points to fit on")
    parser.add_argument("--check", type=int, default=8, metavar="N", help="points to check")
    parser.add_argument("--limit", type=float, default=USEFUL, help="the useful range, × dense")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    chosen = parser.parse_args(arguments)
    try:
        _run(chosen)
    except TransActError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(chosen: argparse.Namespace) -> None:
    tokens = chosen.calibration_tokens, chosen.evaluation_tokens, chosen.sequence_length
    texts = chosen.calibration, chosen.evaluation
    loaded, *windows = load(Setup(chosen.model, *texts, *tokens))
    bench = Bench(loaded, *windows)
    choices = Choices(chosen.granularity, chosen.importance, chosen.recovery)
    bench.damage(choices)
    points = Points(bench, choices, chosen.output)
    first = first_points(points, chosen.first, chosen.limit)
    print(f"# {chosen.granularity}, {chosen.importance}, {chosen.recovery}\n")
    print("Each of the first points, predicted from those before it:\n")
    print(*table(keep_score(bench, first)), sep="\n")
    places = to_check(bench, choices, first, chosen.check, chosen.limit)
    scored = checked(bench, first, [points.at(place) for place in places])
    print(f"\nOther points, predicted from the first {len(first)}:\n")
    print(*table(scored), sep="\n")
    print(f"\n{summary(scored, chosen.limit)}.")
    everything = first + [row.point for row in scored]
    errors = summary(left_out(bench, everything), chosen.limit)
    print(f"Each point predicted from all others: {errors}.")


if __name__ == "__main__":
    sys.exit(main())
