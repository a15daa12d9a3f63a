"""Records the worked example of the first page: cuts of the built-in model, measured here.

Run from the repository root, on a machine without other load: python -m scripts.record_example

Model, texts, token counts and threads are the app's defaults, and the cut is the one that its
sliders start at. The cache is empty, so everything is measured anew.
"""

import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime

import torch

from benchmarks.table import processor
from pages.parts.example import FILE, Concentration, Dense, Example, Point
from pages.server.request import Cut
from transact_core.data.corpus import describe
from transact_core.experiments import prediction
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.experiments.prediction import predict_grid
from transact_core.experiments.sweep import Pair
from transact_core.export.compression import describe_compression
from transact_core.forward.statistics import channels_holding
from transact_core.forward.waists import MODULES
from transact_core.models.architecture import Architecture
from transact_core.planning.law import Ratio
from transact_core.pruning.plan import Decision, head_counts
from transact_core.workers.process import worker_threads

COMMAND = "python -m scripts.record_example"
SHARE = 0.9
"""Share of the activation energy, for the chart of concentration."""
MLP_RATIOS = (0.15, 0.3, 0.45, 0.6)
"""MLP ratios of the recorded curve."""


def progress(stage: str, done: int, total: int) -> None:
    print(f"\r{stage}: {done} of {total}\033[K", end="", file=sys.stderr, flush=True)


def curves(bench: Bench, cut: Cut) -> tuple[list[Pair], list[Pair]]:
    """Ratios of cuts of one module (MHA at every number of heads), and of both, `cut` first."""
    shape = bench.loaded.architecture
    counts = head_counts(shape, cut.granularity)
    heads = [round(1 - count / shape.num_attention_heads, 2) for count in counts]
    heads = sorted(ratio for ratio in heads if ratio)
    one = [(ratio, 0.0) for ratio in heads] + [(0.0, ratio) for ratio in MLP_RATIOS]
    return one, [cut.ratios, *zip(heads, MLP_RATIOS[-len(heads) :], strict=True)]


def measure(bench: Bench, ratios: Pair, choices: Choices) -> Point:
    plan = bench.plan(*ratios, choices, progress)
    measured = compress(bench, plan, choices.recovery, progress)[1]
    point = Point.model_validate(measured, from_attributes=True)
    print(f"\r{ratios}, {choices.recovery}: {point.perplexity:.3f}\033[K", file=sys.stderr)
    return point


def predict(bench: Bench, cut: Cut, left: Architecture, points: Iterable[Point]) -> Ratio:
    """The prediction for a cut, from the damage to each layer and from points measured before."""
    bench.damage(cut.choices, progress)
    known = [prediction.Point.of(point, cut.choices) for point in points]
    widths = [left.mha_width], [left.intermediate_size]
    (predicted,) = predict_grid(bench, cut.choices, known, *widths).values()
    return predicted


def record(bench: Bench, cut: Cut) -> Example:
    statistics = bench.statistics(progress)
    concentration = {
        module: tuple(channels_holding(getattr(statistics, module), SHARE).tolist())
        for module in MODULES
    }
    dense = bench.dense(progress)
    plan = bench.plan(*cut.ratios, cut.choices, progress)
    left = plan.applied_to(bench.loaded.architecture)
    one, both = curves(bench, cut)
    points = {pair: measure(bench, pair, cut.choices) for pair in one}
    predicted = predict(bench, cut, left, points.values())
    points |= {pair: measure(bench, pair, cut.choices) for pair in both}
    texts = (bench.calibration.source, bench.evaluation.source)
    described = describe_compression(bench, Decision(plan), cut.recovery)
    return Example(
        recorded=datetime.now(UTC).replace(microsecond=0),
        command=COMMAND,
        processor=processor(),
        cores=os.cpu_count(),
        environment=described.environment,
        name=bench.loaded.name,
        model=described.model,
        architecture=bench.loaded.architecture,
        text=" and ".join(dict.fromkeys(map(describe, texts))),
        calibration=described.calibration,
        evaluation=described.evaluation,
        sequence_length=described.sequence_length,
        scored_tokens=dense.scored_tokens,
        concentration=Concentration(share=SHARE, **concentration),
        # Layers to be kept whole, and widths by hand, are no part of this address.
        asked={
            name: value
            for name, value in asdict(cut).items()
            if name not in ("keep_layers", "by_hand")
        },
        left=left,
        dense=Dense(footprint=bench.dense_footprint, perplexity=dense.perplexity),
        predicted=predicted,
        cut=points[cut.ratios],
        bare=measure(bench, cut.ratios, replace(cut.choices, recovery="none")),
        points=tuple(points.values()),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRANSACT_CACHE"] = folder
        torch.set_num_threads(worker_threads())
        recorded = record(open_bench(BenchSpec(), progress), Cut())
    FILE.write_text(recorded.model_dump_json(indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:,.0f} kB")
