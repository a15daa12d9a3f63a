"""All cuts by all methods, with the same text, windows and evaluator for every row.

    python -m benchmarks.table --model builtin --calibration FILE --evaluation FILE \\
        --calibration-tokens 16384 --evaluation-tokens 16384 \\
        --output results.csv --markdown results.md

Each row is made in its own process and appended to the CSV when it is done. `--resume` continues an
interrupted run, also on another machine: each row records its machine. Progress goes to stderr.
"""

import argparse
import csv
import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.cuts import DENSE, Row, rows
from benchmarks.row import Result, Setup
from transact_core import __version__
from transact_core.base.cache import ENGINE_VERSION
from transact_core.base.errors import TransActError
from transact_core.data.corpus import read_corpus
from transact_core.experiments.bench import Choices
from transact_core.pruning.closed_form import RECOVERIES

COLUMNS = (
    "cut",
    "method",
    "perplexity",
    "ratio_to_dense",
    "parameters",
    "kv_bytes_per_token",
    "seconds",
    "peak_memory_bytes",
    "reloaded_by_stock",
    "note",
    "processor",
    "threads",
    "date",
)
PACKAGES = ("torch", "transformers", "optipfair", "torch-pruning")
ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the table; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _run(_parser().parse_args(arguments), arguments)
    except TransActError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the rows so far are kept, --resume goes on.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--calibration", default="builtin", metavar="SOURCE")
    parser.add_argument("--evaluation", default="builtin", metavar="SOURCE")
    parser.add_argument("--calibration-tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--evaluation-tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="L")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    parser.add_argument(
        "--only", type=re.compile, metavar="REGEX", help="only rows whose 'cut: method' matches"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cuts and importances")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in --output")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--row-timeout", type=float, default=3600, metavar="SECONDS")
    parser.add_argument(
        "--share-measurements",
        action="store_true",
        help="measure the dense model once for all rows; their seconds then leave that out",
    )
    return parser


def _run(chosen: argparse.Namespace, arguments: list[str]) -> None:
    setup = Setup(
        **{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Setup)}
    )
    wanted = [
        row
        for row in rows(chosen.quick)
        if row.method == DENSE or not chosen.only or chosen.only.search(row.name)
    ]
    if chosen.list:
        print("\n".join(row.name for row in wanted))
        return
    settings = run_settings(setup, arguments)
    done = _open_output(chosen.output, settings, chosen.resume)
    for number, row in enumerate(wanted, start=1):
        if row.key in {(line["cut"], line["method"]) for line in done}:
            continue
        start = time.perf_counter()
        result = run_row(row, setup, chosen.row_timeout)
        if row.method == DENSE and result.perplexity is None:
            raise TransActError(f"The dense model could not be measured: {result.note}.")
        done.append(line_of(row, result, done))
        _append(chosen.output, done[-1])
        shown = "–" if result.perplexity is None else f"{result.perplexity:.2f}"
        print(
            f"[{number}/{len(wanted)}] {row.name}: {shown} {result.note} "
            f"({time.perf_counter() - start:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        if chosen.markdown:
            chosen.markdown.write_text(markdown(done, settings))
    if chosen.markdown:
        chosen.markdown.write_text(markdown(done, settings))


def run_row(row: Row, setup: Setup, timeout: float) -> Result:
    """Makes one row in its own process; if the process dies, the row has a note and no figures."""
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "row.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.row", json.dumps(dataclasses.asdict(setup))]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as stream:
            try:
                status = subprocess.run(
                    [*command, *row.key, str(output)],
                    stdout=stream,
                    stderr=stream,
                    timeout=timeout,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return Result(note=f"stopped after {timeout:.0f} s")
        if status == 0:
            return Result(**json.loads(output.read_text()))
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        return Result(note=f"its process ended with status {status}: {last[:200]}")


# --- the CSV ---------------------------------------------------------------------------------


def line_of(row: Row, result: Result, before: list[dict]) -> dict:
    """A line of the CSV; the dense model's line comes first in `before`."""
    line = {"cut": row.cut.name, "method": row.method, **dataclasses.asdict(result)}
    dense = float(before[0]["perplexity"]) if before else result.perplexity
    measured = result.perplexity is not None
    line["ratio_to_dense"] = result.perplexity / dense if measured else None
    line |= {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }
    return {column: line[column] for column in COLUMNS}


def _open_output(path: Path, settings: dict, resume: bool) -> list[dict]:
    """The lines of an earlier run; writes the header of a new file.

    Raises:
        TransActError: the file exists and may not be resumed, or was made with other settings.
    """
    beside = path.with_suffix(path.suffix + ".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(settings, indent=1) + "\n")
        with path.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
        return []
    if not resume:
        raise TransActError(f"{path} exists; add --resume to go on with it or name another file.")
    earlier = json.loads(beside.read_text()) if beside.is_file() else {}
    for name in ("setup", "texts", "versions"):
        if earlier.get(name) != settings[name]:
            raise TransActError(
                f"{path} was made with other {name} ({earlier.get(name)}); name another file."
            )
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, line: dict) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(line)


def run_settings(setup: Setup, arguments: list[str]) -> dict:
    """Everything that the figures depend on, apart from the rows themselves."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.table", *arguments]),
        "setup": dataclasses.asdict(setup),
        "texts": {
            name: read_corpus(getattr(setup, name)).sha256 for name in ("calibration", "evaluation")
        },
        "versions": {
            "transact_core": __version__,
            "engine": str(ENGINE_VERSION),
            "python": platform.python_version(),
            **_versions(),
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The processor's name if the system knows it, or else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# --- the Markdown ----------------------------------------------------------------------------


def markdown(lines: list[dict], settings: dict) -> str:
    """The rows as Markdown tables, one for each cut, best first and failures last."""
    setup, versions = settings["setup"], settings["versions"]
    machines = list(dict.fromkeys(map(_machine, lines)))
    head = [
        f"```sh\n{settings['command']}\n```",
        "",
        f"Model {setup['model']}; {setup['calibration_tokens']:,} calibration and "
        f"{setup['evaluation_tokens']:,} evaluation tokens in windows of "
        f"{setup['sequence_length']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f"; {_days(lines)}.",
        "",
        _machines_in_words(machines),
        "",
        "Seconds are the time of scoring, cutting and repairing, without loading and measuring. "
        "Memory is the peak resident size of that process until then, including the dense "
        "weights, Python and its libraries; the dense row shows these alone. Every perplexity is "
        'of the saved weights, and "yes" says that stock transformers had reloaded them.'
        + (
            " Measurements of the dense model were shared among rows, so the seconds of our rows "
            "leave them out where an earlier row had made them."
            if setup["share_measurements"]
            else ""
        ),
    ]
    several = len(machines) > 1
    for cut in dict.fromkeys(line["cut"] for line in lines):
        group = sorted((line for line in lines if line["cut"] == cut), key=_order)
        head += [
            "",
            f"### Removed: {cut}",
            "",
            *_grid(group),
            "| method | perplexity | × dense | parameters (M) | KV bytes / token | seconds "
            "| peak memory (MB) | reloaded by stock |" + (" machine |" if several else ""),
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
            + (" ---: |" if several else ""),
            *(
                _markdown_row(line)
                + (f" {machines.index(_machine(line)) + 1} |" if several else "")
                for line in group
            ),
        ]
    return "\n".join(head) + "\n"


def _grid(lines: list[dict]) -> list[str]:
    """A table of the ratio to dense by importance and recovery, if there are several recoveries."""
    known = {row.key: row.choices for row in rows()}
    ratios: dict[str, dict[str, str]] = {}
    for line in lines:
        choices, ratio = known.get((line["cut"], line["method"])), _number(line["ratio_to_dense"])
        if choices is None or ratio is None or not _is_plain(choices):
            continue
        name, _, _ = line["method"].removeprefix("ours: ").rpartition(", ")
        ratios.setdefault(name, {})[choices.recovery] = _times(ratio)
    recoveries = [
        name for name in RECOVERIES if any(name in by_recovery for by_recovery in ratios.values())
    ]
    if len(recoveries) < 2:
        return []
    return [
        f"| ours, × dense | {' | '.join(recoveries)} |",
        f"| --- |{' ---: |' * len(recoveries)}",
        *(
            f"| {name} | {' | '.join(by_recovery.get(recovery, '') for recovery in recoveries)} |"
            for name, by_recovery in ratios.items()
        ),
        "",
    ]


def _times(ratio: float) -> str:
    return format(ratio, ",.3f" if ratio < 100 else ",.0f")


def _is_plain(choices: Choices) -> bool:
    return not choices.sequential and choices.steps == 1 and choices.granularity != "auto"


def _machine(line: dict) -> str:
    threads = int(line["threads"])
    return f"{line['processor']}, {threads} thread{'s' if threads > 1 else ''}"


def _machines_in_words(machines: list[str]) -> str:
    if len(machines) == 1:
        return f"Machine: {machines[0]}."
    numbered = "; ".join(f"({number}) {each}" for number, each in enumerate(machines, start=1))
    return f"Machines: {numbered}. Compare seconds of one machine only."


def _days(lines: list[dict]) -> str:
    days = sorted({line["date"] for line in lines})
    return " to ".join(dict.fromkeys((days[0], days[-1])))


def _order(line: dict) -> float:
    return _number(line["perplexity"], float("inf"))


def _number(value: str | float | None, missing: float | None = None) -> float | None:
    return missing if value in (None, "") else float(value)


def _markdown_row(line: dict) -> str:
    def cell(column: str, form: str, scale: float = 1) -> str:
        value = _number(line[column])
        return "–" if value is None else format(value / scale, form)

    last = line["reloaded_by_stock"] or ""
    if line["note"]:
        last = f"{last} ({line['note']})" if last else line["note"]
    cells = [
        line["method"],
        cell("perplexity", ",.2f"),
        "–" if (ratio := _number(line["ratio_to_dense"])) is None else _times(ratio),
        cell("parameters", ",.1f", 1e6),
        cell("kv_bytes_per_token", ",.0f"),
        cell("seconds", ",.1f"),
        cell("peak_memory_bytes", ",.0f", 1e6),
        last.replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
