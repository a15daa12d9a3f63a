"""Tasks beside the harness' own way: the same scores item by item, and the CPU time of both.

Every task is run by stock `lm_eval.evaluate` with `HFLM`, its rows put under the stock tasks by
themselves, and by `experiments.tasks`, on the same questions, for the dense built-in model and for
a cut of it. Printed are the questions whose scores differ, the largest difference between
log-likelihoods in nats, and CPU seconds. What is kept on disk is left out: all is scored.

    python -m benchmarks.tasks --task-data DIR [--limit 200] [--tasks piqa,…] [--batch-size 1]

The last line is the ratio that decides: the time of both models here over stock's of the dense one.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transact_core.base.files import cache_folder
from transact_core.data.windows import WindowSpec
from transact_core.experiments.bench import Choices, carry_out
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.experiments.harness import HarnessTask, require_harness
from transact_core.experiments.task_data import READY_MADE, read_task, task_of, tasks_in
from transact_core.experiments.tasks import Contestant, contestant_of, contestant_of_cut, run_tasks

Scores = dict[int, dict[str, float]]
"""By the number of a row: its metrics."""


@dataclass(frozen=True)
class Scored:
    """What was made of some rows."""

    scores: Scores
    likelihoods: dict[int, list[float]]
    cpu_seconds: float


def stock_scores(
    name: str,
    rows: Sequence[dict[str, Any]],
    numbers: Sequence[int],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 1,
) -> Scored:
    """The metrics of these rows by stock `lm_eval.evaluate` and `HFLM`, without examples shown.

    Rows that have a `UID` go under the stock tasks of BLiMP that it names. Nothing of this project
    has a part in it.
    """
    require_harness()
    from datasets import Dataset
    from lm_eval import evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        rows_of[f"blimp_{row['UID']}" if "UID" in row else name].append(number)
    tasks, samples, asked = {}, {}, set(numbers)
    for task, members in rows_of.items():
        places = [place for place, number in enumerate(members) if number in asked]
        if not places:
            continue
        config = _stock_yaml(task)
        dataset = Dataset.from_list([rows[number] for number in members])
        splits = defaultdict(lambda dataset=dataset: dataset)
        config["custom_dataset"] = lambda splits=splits, **_: splits
        if name in READY_MADE:
            config.pop("process_docs", None)
        tasks[task] = ConfigurableTask(config=config)
        tasks[task].set_config("num_fewshot", 0)
        samples[task] = places
    lm = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    start = time.process_time()
    found = evaluate(lm, tasks, samples=samples, bootstrap_iters=0)
    seconds = time.process_time() - start
    scores: Scores = {}
    likelihoods = {}
    for task, answered in found["samples"].items():
        for sample in answered:
            number = rows_of[task][sample["doc_id"]]
            scores[number] = {metric: float(sample[metric]) for metric in sample["metrics"]}
            likelihoods[number] = [float(answer[0][0]) for answer in sample["resps"]]
    return Scored(scores, likelihoods, seconds)


def _stock_yaml(task: str) -> dict[str, Any]:
    """A stock task's configuration, found as the harness' `TaskManager` finds it, but alone."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks"
    for path in (folder / "blimp" if task.startswith("blimp_") else folder).rglob("*.yaml"):
        if f"\ntask: {task}\n" in f"\n{path.read_text(encoding='utf-8')}":
            return load_yaml(path)
    raise SystemExit(f"no stock task {task}")


def own_scores(task: HarnessTask, contestant: Contestant) -> Scored:
    """The metrics of a task's questions as `experiments.tasks` has them, and CPU seconds."""
    start = time.process_time()
    *_, last = run_tasks([task], contestant)
    seconds = time.process_time() - start
    answered = dict(zip((item.number for item in task.items), last.questions[0], strict=True))
    return Scored(
        {number: question.values for number, question in answered.items()},
        {
            number: [answer.log_likelihood for answer in question.answers]
            for number, question in answered.items()
        },
        seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task-data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tasks", metavar="NAME,…", help="default: all that the folder has")
    parser.add_argument("--limit", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mha-ratio", type=float, default=1 / 3)
    parser.add_argument("--mlp-ratio", type=float, default=0.3)
    parser.add_argument("--calibration-tokens", type=int, default=8192, help="of the cut")
    parser.add_argument("--batch-size", type=int, default=1, help="of stock HFLM")
    parser.add_argument(
        "--dense-only", action="store_true", help="run stock HFLM on the dense model alone"
    )
    chosen = parser.parse_args()
    names = chosen.tasks.split(",") if chosen.tasks else tasks_in(chosen.task_data)

    windows = WindowSpec(calibration_tokens=chosen.calibration_tokens)
    bench = open_bench(BenchSpec(windows=windows))
    plan = bench.plan(chosen.mha_ratio, chosen.mlp_ratio, Choices())
    dense, cut = bench.loaded.model, carry_out(bench, plan, Choices.recovery)[0]
    contestants = {
        "dense": (dense, contestant_of(bench.loaded)),
        "cut": (cut, contestant_of_cut(bench, plan, Choices.recovery, cut)),
    }
    own_seconds, stock_seconds = defaultdict(float), defaultdict(float)
    print(
        f"{'task':18}{'model':7}{'n':>5}{'acc':>8}{'norm':>8}{'differ':>8}{'nats':>10}"
        f"{'own s':>9}{'stock s':>9}{'own/stock':>11}"
    )
    for name in names:
        data = read_task(name, 0, chosen.task_data)
        task = task_of(data, 0, chosen.limit, chosen.seed)
        rows = [
            json.loads(line)
            for line in (chosen.task_data / f"{name}.jsonl").read_text().splitlines()
        ]
        numbers = [item.number for item in task.items]
        for which, (model, contestant) in contestants.items():
            own = own_scores(task, contestant)
            own_seconds[which] += own.cpu_seconds
            line = f"{name:18}{which:7}{len(numbers):>5}"
            for metric in ("acc", "acc_norm"):
                values = [scores.get(metric, math.nan) for scores in own.scores.values()]
                line += f"{sum(values) / len(values):>8.3f}"
            if which == "dense" or not chosen.dense_only:
                tokenizer = bench.loaded.tokenizer
                stock = stock_scores(name, rows, numbers, model, tokenizer, chosen.batch_size)
                stock_seconds[which] += stock.cpu_seconds
                differ = sum(
                    own.scores[number][metric] != stock.scores[number][metric]
                    for number in numbers
                    for metric in ("acc", "acc_norm")
                    if metric in own.scores[number]
                )
                nats = max(
                    abs(one - other)
                    for number in numbers
                    for one, other in zip(
                        own.likelihoods[number], stock.likelihoods[number], strict=True
                    )
                )
                line += (
                    f"{differ:>8}{nats:>10.1e}{own.cpu_seconds:>9.1f}{stock.cpu_seconds:>9.1f}"
                    f"{own.cpu_seconds / stock.cpu_seconds:>11.2f}"
                )
            print(line, flush=True)
    both = sum(own_seconds.values())
    print(
        f"both models here {both:.1f} s, stock HFLM of the dense one "
        f"{stock_seconds['dense']:.1f} s with batches of {chosen.batch_size}: "
        f"{both / stock_seconds['dense']:.2f} times"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        # Converted models stay where they are; what is measured goes into a folder of its own.
        models = cache_folder() / "models"
        models.mkdir(parents=True, exist_ok=True)
        (Path(folder) / "models").symlink_to(models.absolute())
        os.environ["TRANSACT_CACHE"] = folder
        main()
