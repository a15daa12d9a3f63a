"""Time of a curve of measured points divided by that of the evaluations and repairs in it.

    python -m benchmarks.curve                              # without recovery
    python -m benchmarks.curve --recovery least-squares
    python -m benchmarks.curve --mha                        # attention: auto beside others

Every point is measured as the app and the command line do it, with an empty cache. Directly after
it the same model is made again and only its evaluation is timed, in a plain loop over windows; with
a recovery, the repair is timed too. The ratio of the sums is printed. The calibration pass and the
dense model's evaluation are not timed, as they are shared by all curves.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from benchmarks.row import Setup, load
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.sweep import point_at
from transact_core.importance.scores import IMPORTANCES
from transact_core.pruning.closed_form import RECOVERIES, recover
from transact_core.pruning.plan import GRANULARITIES
from transact_core.pruning.surgery import prune


@torch.inference_mode()
def plain_loop(model: LlamaForCausalLM, windows: Windows) -> float:
    """Mean NLL in nats of the windows, one at a time, as a script with stock transformers would."""
    total = 0.0
    for ids in windows.ids:
        logits = model(ids[None].to(model.device), use_cache=False).logits[0, :-1].float()
        total += functional.cross_entropy(logits, ids[1:].to(model.device), reduction="sum").item()
    return total / (len(windows) * (windows.sequence_length - 1))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work` and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def curve(bench: Bench, ratios: list[float], choices: Choices) -> tuple[float, float]:
    """Seconds of the points, and of the evaluations and repairs in them; prints each point."""
    points = parts = 0.0
    dense = bench.loaded.model
    for ratio in ratios:
        point, seconds = timed(lambda ratio=ratio: point_at(bench, (0.0, ratio), choices))
        model = prune(dense, point.plan, with_biases=choices.recovery == "bias")
        repair = 0.0
        if choices.recovery != "none" and point.plan.cuts_anything(bench.loaded.architecture):
            _, repair = timed(
                lambda model=model, point=point: recover(
                    dense, model, point.plan, bench.calibration, choices.recovery
                )
            )
        _, evaluation = timed(lambda model=model: plain_loop(model, bench.evaluation))
        points, parts = points + seconds, parts + evaluation + repair
        print(
            f"MLP {ratio:.0%}: {seconds:.2f} s, evaluation {evaluation:.2f} s, "
            f"repair {repair:.2f} s, {seconds / (evaluation + repair):.3f} ×",
            flush=True,
        )
    return points, parts


def main() -> None:
    """Prints the ratio of an evenly spaced MLP curve, or of `auto` to each granularity."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curve", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--text", default="builtin", metavar="SOURCE")
    parser.add_argument("--calibration-tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="L")
    parser.add_argument("--importance", choices=list(IMPORTANCES), default="activation")
    parser.add_argument("--recovery", choices=RECOVERIES, default="none")
    parser.add_argument("--points", type=int, default=11)
    parser.add_argument("--largest", type=float, default=0.7)
    parser.add_argument("--mha", action="store_true", help="time auto on a third of the attention")
    chosen = parser.parse_args()
    tokens = chosen.calibration_tokens, chosen.evaluation_tokens, chosen.sequence_length
    loaded, *windows = load(Setup(chosen.model, chosen.text, chosen.text, *tokens))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRANSACT_CACHE"] = folder
        bench = Bench(loaded, *windows)
        choices = Choices(importance=chosen.importance, recovery=chosen.recovery)
        bench.prepare(choices)
        bench.dense()
        if chosen.mha:
            print(auto_over_fixed(bench, choices))
            return
        step = chosen.largest / chosen.points
        points, parts = curve(
            bench, [step * point for point in range(1, chosen.points + 1)], choices
        )
    print(f"{chosen.points} points: {points:.1f} s over {parts:.1f} s, {points / parts:.3f} ×")


def auto_over_fixed(bench: Bench, choices: Choices) -> str:
    """Time of a point with `auto` divided by that with each granularity; statistics are known."""
    seconds = {}
    for granularity in (*GRANULARITIES, "auto"):
        tried = Choices(granularity, choices.importance, choices.recovery)
        if granularity == "head-dims":
            bench.pairs()
        point, seconds[granularity] = timed(
            lambda tried=tried: point_at(bench, (1 / 3, 0.0), tried)
        )
        print(f"{granularity}: {seconds[granularity]:.2f} s, chose {point.plan.granularity}")
    auto = seconds.pop("auto")
    ratios = ", ".join(f"{auto / other:.2f} × {name}" for name, other in seconds.items())
    return f"auto: {ratios}; {auto / statistics.mean(seconds.values()):.2f} × their mean"


if __name__ == "__main__":
    main()
