"""Kills the command line at random moments, makes its disk fail, and checks the files left behind.

    python -m tests.trust.kills --trials 100 --disks 60

Each trial runs one command on a small random model in a folder of its own and stops it before its
end:

    time        SIGKILL at a random moment of the run
    before      SIGKILL directly before one of its file operations, chosen at random
    after       SIGKILL up to 10 ms after one of them, possibly in the middle of a write
    file-limit  no file can grow beyond a random size
    full        the disk has a random size that may be too small (root only)
    read-only   the disk cannot be written (root only)

Every file that is then visible must be byte for byte the file that an undisturbed run makes; a
checkpoint under its final name is complete or absent. The same command must then succeed, make the
same files as the undisturbed run, and leave no partial file. A killed sweep continues in its file:
points that were there are not measured again and keep their first `seconds`.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

KILLS = ("time", "before", "after")
DISKS = ("file-limit", "full", "read-only")
SECONDS_AT_MOST = 120
"""Time limit of one run. A run takes a few seconds; one that hangs is killed after this."""
AUDITED = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
"""Python's audit events that count as file operations, besides opening a file for writing."""
HALF_WRITTEN = (".transact-partial", ".incomplete", ".tmp")
"""Endings of the names of partial files: ours, the hub library's, and other libraries'."""


@dataclass(frozen=True)
class Work:
    """A command of the command line, for a trial's folder."""

    name: str
    arguments: Callable[[Path], list[str]]
    results: str | None
    """The checkpoint that the command writes into the trial's folder; None if it writes none."""


@dataclass
class Ending:
    """How one run of a command ended."""

    status: int
    """Exit status; negative for a signal."""
    out: str
    err: str
    seconds: float
    peak_mb: float
    """Peak resident memory in MB."""
    events: int
    """Number of file operations, or 0 if the run was killed."""


@dataclass
class Reference:
    """How an undisturbed run ended, and the files that it made."""

    ending: Ending
    files: dict[str, bytes] = field(repr=False)


# --- running ---------------------------------------------------------------------------------


def _writes(event: str, arguments: tuple) -> bool:
    """Whether an audit event is an operation that changes files."""
    if event == "open":
        _, mode, flags = arguments
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & os.O_CREAT)
    return event in AUDITED


def _child(work: Work, folder: Path, stop: tuple[str, float], pipes: dict[str, int]) -> None:
    """Runs the command in this forked process, which ends with it. `pipes` are the write ends."""
    import torch
    from huggingface_hub import constants

    from transact_core.cli import main

    os.dup2(pipes["out"], 1)
    os.dup2(pipes["err"], 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ["TRANSACT_CACHE"] = str(folder / "cache")
    constants.HF_HUB_CACHE = str(folder / "hub")
    torch.set_num_threads(1)
    kind, amount = stop
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if not _writes(event, arguments):
            return
        seen += 1
        if seen == amount and kind == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == amount and kind == "after":
            os.write(pipes["events"], b"now")

    sys.addaudithook(watch)
    if kind == "file-limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(amount), resource.RLIM_INFINITY))
    try:
        status = main(work.arguments(folder))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os.write(pipes["events"], f"events {seen}".encode())
    os._exit(status)


def run(work: Work, folder: Path, stop: tuple[str, float] = ("", 0), pause: float = 0) -> Ending:
    """One run of the command, stopped as `stop` says.

    `stop` is a kind and its amount: seconds for `time`, the count of the file operation for
    `before` and `after`, bytes for `file-limit`. `pause` is how many seconds `after` waits before
    it kills.
    """
    pipes = {name: os.pipe() for name in ("out", "err", "events")}
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(work, folder, stop, {name: ends[1] for name, ends in pipes.items()})
    for _, write_end in pipes.values():
        os.close(write_end)
    read: dict[str, bytes] = {}

    def drain(name: str) -> None:
        collected = b""
        while piece := os.read(pipes[name][0], 65536):
            collected += piece
            if name == "events" and piece.startswith(b"now"):
                time.sleep(pause)
                os.kill(pid, signal.SIGKILL)
        read[name] = collected
        os.close(pipes[name][0])

    threads = [threading.Thread(target=drain, args=(name,)) for name in pipes]
    timer = threading.Timer(
        stop[1] if stop[0] == "time" else SECONDS_AT_MOST, os.kill, (pid, signal.SIGKILL)
    )
    for thread in (*threads, timer):
        thread.start()
    for thread in threads:
        thread.join()
    timer.cancel()
    _, status, usage = os.wait4(pid, 0)
    counted = read["events"].decode()
    return Ending(
        status=os.waitstatus_to_exitcode(status),
        out=read["out"].decode(),
        err=read["err"].decode(),
        seconds=time.monotonic() - began,
        peak_mb=usage.ru_maxrss / 1024,
        events=int(counted.split()[1]) if counted.startswith("events") else 0,
    )


# --- the files left behind -------------------------------------------------------------------


def hidden(path: Path) -> bool:
    """Whether a file, relative to a trial's folder, is not compared: partial, or a library's own.

    The hub library fills its cache file by file, so each file must be complete, but not the folder.
    SQLite's files are checked through the points that are read from them.
    """
    own = {".locks", "CACHEDIR.TAG"}
    return any(
        part.endswith(HALF_WRITTEN) or part in own or part.startswith(("tmp", "results.sqlite"))
        for part in path.parts
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """Contents of the visible files in a trial's folder, by relative path."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (folder / path).read_bytes() for path in found if not hidden(path)}


def comparable(name: str, content: bytes) -> object:
    """The part of a file that two runs must agree on: all of it, except the seconds of points."""
    if not name.endswith(".csv"):
        return content
    rows = [line.split(",") for line in content.decode().splitlines()]
    column = rows[0].index("seconds")
    return [row[:column] + row[column + 1 :] for row in rows]


def check_visible(folder: Path, reference: Reference, results: str | None) -> None:
    """Raises AssertionError if a visible file is not one that an undisturbed run makes."""
    there = files_in(folder)
    for name, content in there.items():
        assert name in reference.files, f"{name} is there and should not be"
        found, whole = comparable(name, content), comparable(name, reference.files[name])
        # A sweep measures the most informative points first and writes whole rows, so an unfinished
        # file has fewer rows.
        whole_so_far = name.endswith(".csv") and all(row in whole for row in found)
        assert found == whole or whole_so_far, f"{name} is half-written"
    converted = [str(path.relative_to(folder)) for path in folder.glob("cache/models/[!.]*")]
    for checkpoint in [results, *converted] if results else converted:
        made = {name for name in there if name.startswith(f"{checkpoint}/")}
        whole = {name for name in reference.files if name.startswith(f"{checkpoint}/")}
        assert made in (set(), whole), f"{checkpoint} is visible and not whole"


def check_again(
    folder: Path, reference: Reference, work: Work, keeps_points: bool = False
) -> Ending:
    """Runs the command again: it must succeed, make the same files and leave no partial file."""
    # A checkpoint is never overwritten, so the one that is there, already checked, is removed. A
    # sweep continues in its file, unless the disk could not keep the points of the file.
    points = folder / "points.csv"
    if not keeps_points:
        points.unlink(missing_ok=True)
    finished = points.read_text().splitlines() if points.exists() else []
    if work.results and (folder / work.results).is_dir():
        shutil.rmtree(folder / work.results)
    ending = run(work, folder)
    assert ending.status == 0, f"the next start ended with {ending.status}: {ending.err[-2000:]}"
    there = files_in(folder)
    assert there.keys() == reference.files.keys(), (
        f"the next start made {sorted(there.keys() ^ reference.files.keys())} differently"
    )
    for name, content in there.items():
        same = comparable(name, content) == comparable(name, reference.files[name])
        assert same, f"the next start made another {name}"
    again = set(points.read_text().splitlines()) if finished else set()
    assert again.issuperset(finished), "finished points were measured again"
    assert ending.out == reference.ending.out, "the next start printed something else"
    left = [str(path) for path in folder.rglob("*") if path.name.endswith(".transact-partial")]
    assert not left, f"left behind: {left}"
    return ending


def check_refusal(ending: Ending) -> None:
    """A run whose disk failed must have succeeded or ended with a single error line."""
    lines = [line for line in ending.err.splitlines() if line.startswith("Error:")]
    assert ending.status in (0, 2), f"exit status {ending.status}: {ending.err[-2000:]}"
    assert len(lines) == (1 if ending.status else 0), ending.err[-2000:]
    assert "Traceback" not in ending.err, ending.err[-2000:]


# --- disks -----------------------------------------------------------------------------------


@contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Mounts a file system of a given size at a folder."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def can_mount(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    try:
        with disk(folder, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- the commands ----------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """Makes a GGUF file, a checkpoint, a text and a compression.json, in a separate process."""
    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the inputs were not made"
        return
    from tests.conftest import make_model, make_tokenizer
    from tests.models.test_load import write_gguf
    from transact_core.cli import main
    from transact_core.data.corpus import read_corpus

    os.environ["TRANSACT_CACHE"] = str(folder / "cache")
    model = make_model(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    tokenizer = make_tokenizer()
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(read_corpus("builtin").text[:20_000])
    (folder / "made").mkdir()
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        status = main(works(folder)["export"].arguments(folder / "made"))
    os._exit(status)


def works(inputs: Path) -> dict[str, Work]:
    """The commands that are stopped, by what they exercise."""
    model, text = str(inputs / "model"), str(inputs / "text.txt")
    length = ["--sequence-length", "32"]
    evaluation = ["--evaluation", text, "--evaluation-tokens", "128", *length]
    texts = ["--calibration", text, "--calibration-tokens", "512", *evaluation]
    half = ["--mha-ratio", "0.5", "--mlp-ratio", "0.3"]

    def command(*words: str) -> Callable[[Path], list[str]]:
        return lambda folder: [word.replace("TRIAL", str(folder)) for word in words]

    return {
        "download": Work(
            "download", command("evaluate", "--model", "tiny/model", *evaluation, "--json"), None
        ),
        "conversion": Work(
            "conversion",
            command("evaluate", "--model", str(inputs / "tiny.gguf"), *evaluation, "--json"),
            None,
        ),
        "calibration": Work(
            "calibration",
            command(
                "prune",
                "--model",
                model,
                *half,
                "--importance",
                "reconstruction",
                "--granularity",
                "head-dims",
                "--output",
                "TRIAL/out",
                *texts,
                "--json",
            ),
            "out",
        ),
        "export": Work(
            "export",
            command("prune", "--model", model, *half, "--output", "TRIAL/out", *texts, "--json"),
            "out",
        ),
        "apply": Work(
            "apply",
            command(
                "apply",
                str(inputs / "made" / "out" / "compression.json"),
                "--output",
                "TRIAL/out",
                "--json",
            ),
            "out",
        ),
        "sweep": Work(
            "sweep",
            command(
                "sweep",
                "--model",
                model,
                "--mha-ratio",
                "0,0.5",
                "--mlp-ratio",
                "0,0.3,0.5",
                "--recovery",
                "none",
                "--output",
                "TRIAL/points.csv",
                *texts,
            ),
            None,
        ),
    }


def stock_loads(folder: Path) -> None:
    """Raises AssertionError if stock transformers does not load every tensor of a checkpoint."""
    pid = os.fork()
    if pid == 0:
        from transformers import AutoModelForCausalLM

        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        os._exit(any(info.values()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, f"{folder} does not load"


def make_reference(work: Work, folder: Path) -> Reference:
    folder.mkdir()
    ending = run(work, folder)
    assert ending.status == 0, ending.err
    files = files_in(folder)
    for checkpoint in (folder / "out", *folder.glob("cache/models/*")):
        if checkpoint.is_dir():
            stock_loads(checkpoint)
    shutil.rmtree(folder)
    return Reference(ending, files)


def trial(work: Work, kind: str, folder: Path, reference: Reference, chance: random.Random) -> str:
    """Runs one trial; returns how the stopped run ended: killed, refused or finished."""
    folder.mkdir()
    amounts = {
        "time": chance.uniform(0, reference.ending.seconds),
        "before": chance.randint(1, max(1, reference.ending.events)),
        "after": chance.randint(1, max(1, reference.ending.events)),
        "file-limit": chance.choice([0, 100, chance.randint(1, 200_000)]),
    }
    stop = (kind, amounts.get(kind, 0))
    pause = chance.uniform(0, 0.01)
    needed = sum(len(content) for content in reference.files.values()) // 1024
    if kind in ("full", "read-only"):
        with disk(folder, max(16, chance.randint(0, needed))):
            if kind == "read-only":
                remount(folder, "ro")
            ending = run(work, folder)
            check_refusal(ending)
            check_visible(folder, reference, work.results)
            remount(folder, "rw,size=100m")
            check_again(folder, reference, work)
    else:
        ending = run(work, folder, stop, pause)
        if kind == "file-limit":
            check_refusal(ending)
        elif ending.status != 0:
            assert ending.status == -signal.SIGKILL, ending.err[-2000:]
        check_visible(folder, reference, work.results)
        check_again(folder, reference, work, keeps_points=kind in KILLS)
    shutil.rmtree(folder)
    return {-signal.SIGKILL: "killed", 2: "refused"}.get(ending.status, "finished")


def _dealt(works: list[Work], kinds: Sequence[str], count: int) -> Iterator[tuple[Work, str]]:
    """Pairs of a command and a kind, so that few of them have every command and every kind."""
    for n in range(count):
        yield works[n % len(works)], kinds[(n + n // len(works)) % len(kinds)]


def campaign(
    names: list[str], trials: int, disks: int, seed: int, folder: Path
) -> dict[str, object]:
    """Runs all trials; returns counts, and failures with the options that reproduce them."""
    from tests.trust.hub import hub_of

    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    hub = hub_of(inputs / "model", int(os.environ["HF_ENDPOINT"].rsplit(":", 1)[1]))
    served = os.fork()
    if served == 0:
        hub.serve_forever()
    hub.server_close()
    try:
        chosen = [works(inputs)[name] for name in names]
        references = {work.name: make_reference(work, folder / "trial") for work in chosen}
        kinds = list(DISKS if can_mount(folder / "disk") else DISKS[:1])
        plan = [*_dealt(chosen, KILLS, trials), *_dealt(chosen, kinds, disks)]
        counts: Counter[str] = Counter()
        failures = []
        for index, (work, kind) in enumerate(plan):
            place = folder / "trial"
            try:
                how = trial(work, kind, place, references[work.name], random.Random(seed + index))
                counts[f"{work.name}, {kind}: {how}"] += 1
            except AssertionError as problem:
                failures.append(f"{work.name}, {kind}, --seed {seed + index}: {problem}")
                shutil.rmtree(place, ignore_errors=True)
            print(f"{index + 1} of {len(plan)}", end="\r", file=sys.stderr, flush=True)
    finally:
        os.kill(served, signal.SIGKILL)
        os.waitpid(served, 0)
    return {"trials": len(plan), "counts": dict(sorted(counts.items())), "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="runs that are killed")
    parser.add_argument("--disks", type=int, default=60, help="runs whose disk fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--works", default=",".join(works(Path())), help="which commands")
    chosen = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="transact-kills-") as folder:
        result = campaign(
            chosen.works.split(","), chosen.trials, chosen.disks, chosen.seed, Path(folder)
        )
    print(json.dumps(result | {"seconds": round(time.monotonic() - began)}, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    # Set before any import that starts threads, because the trials are forks of this process.
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
    }
    import transact_core.cli  # noqa: F401 - imported once for all forks

    sys.exit(main())
