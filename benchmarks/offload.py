"""Memory and time of commands with the model's layers in memory, and with them on disk.

    python -m benchmarks.offload --layers 29 --hidden 3072      # 6.1 GB in bfloat16

Writes a random LLaMA in bfloat16, layer by layer, and runs `prune`, `apply` and `evaluate` on it,
each with its layers in memory and with `--offload`, in processes of their own that compute in
bfloat16. Memory is read from outside every 20 ms: `RssAnon`, which belongs to no file, and
`RssFile`, pages of mapped files, which the system takes back where it needs them. Of each the
largest value is printed. The results of both ways are compared.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cost import write_random_model

COMMANDS = ("prune", "apply", "evaluate")
WAYS = {"memory": [], "disk": ["--offload"]}
"""Where the layers are, and the options that put them there."""
READ_BYTES = 1 << 24
"""Bytes that a plain reading of the files takes at a time."""
SECONDS_BETWEEN = 0.02
"""Between two looks at a process's memory."""


@dataclass(frozen=True)
class Run:
    """One command in a process of its own."""

    seconds: float
    cpu_seconds: float
    """Of all its threads, which do not grow where other programs use the processor too."""
    anonymous_bytes: int
    """The largest `RssAnon`."""
    mapped_bytes: int
    """The largest `RssFile`."""
    printed: str


def plain_reading(folder: Path) -> float:
    """Seconds that the weight files take to be read once, from the disk where the system lets go of
    what it holds of them in memory."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    start = time.perf_counter()
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def run(words: list[str], cache: Path) -> Run:
    """Runs a command of the library; nothing is looked up that another run has measured.

    Raises:
        CalledProcessError: it did not exit with status 0; its stderr is passed through.
    """
    command = [sys.executable, "-m", "transact_core", *words]
    start, anonymous, mapped = time.perf_counter(), 0, 0
    environment = os.environ | {"TRANSACT_CACHE": str(cache)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=environment)
        ended = 0
        while not ended:
            now = memory_of(process.pid)
            anonymous = max(anonymous, now.get("RssAnon", 0))
            mapped = max(mapped, now.get("RssFile", 0))
            time.sleep(SECONDS_BETWEEN)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        cpu_seconds = used.ru_utime + used.ru_stime
        return Run(seconds, cpu_seconds, anonymous, mapped, output.read())


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of each kind of resident memory of a process; none where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines if line.startswith("Rss"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def fingerprint(folder: Path) -> str:
    """Of the weights in a folder and how they are cut into files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stored:
            digest.update(hashlib.file_digest(stored, "sha256").digest())
    return digest.hexdigest()


def measured(chosen: argparse.Namespace, place: Path) -> Iterator[str]:
    """The lines of the report."""
    dense = place / "dense"
    dense.mkdir()
    architecture = write_random_model(dense, chosen.layers, chosen.hidden, dtype=torch.bfloat16)
    layer, stream = architecture.layer_parameters(0) * 2, chosen.tokens * chosen.hidden * 2
    yield (
        f"{architecture.parameters * 2 / 1e9:.2f} GB in bfloat16, {chosen.layers} layers of "
        f"{layer / 1e6:,.0f} MB; a residual stream of {stream / 1e6:,.0f} MB"
    )
    yield f"one plain reading of the files: {plain_reading(dense):.1f} s"
    found: dict[str, set[str]] = {}
    for command in chosen.commands:
        for way in chosen.ways:
            own = place / way
            output = None if command == "evaluate" else own / command
            words = words_of(command, chosen, dense, own / "prune", output)
            done = run([*words, *WAYS[way], "--json"], own / f"cache-{command}")
            yield (
                f"{command:10}{way:8}{done.seconds:8.1f} s, of the processor "
                f"{done.cpu_seconds:8.1f} s, RssAnon at most {done.anonymous_bytes / 1e6:,.0f} MB, "
                f"RssFile {done.mapped_bytes / 1e6:,.0f} MB"
            )
            result = json.dumps(json.loads(done.printed), sort_keys=True)
            weights = fingerprint(output) if output else ""
            found.setdefault(command, set()).add(f"{result} {weights}")
        if len(chosen.ways) > 1:
            same = "the same bits" if len(found[command]) == 1 else "NOT the same"
            yield f"{command}: results and tensors are {same}"


def words_of(
    command: str, chosen: argparse.Namespace, dense: Path, cut: Path, output: Path | None
) -> list[str]:
    """The command line of a command; `cut` is the folder that `prune` writes."""
    if command == "apply":
        words = ["apply", cut / "compression.json"]
    else:
        words = [command, "--model", dense, "--dtype", "bfloat16", "--device", "cpu"]
        words += ["--evaluation-tokens", chosen.evaluation_tokens]
        words += ["--sequence-length", chosen.sequence_length]
    if command == "prune":
        words += ["--mha-ratio", chosen.mha_ratio, "--mlp-ratio", chosen.mlp_ratio]
        words += ["--calibration-tokens", chosen.tokens]
    return list(map(str, words if output is None else [*words, "--output", output]))


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offload", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--hidden", type=int, default=3072, help="a multiple of 192")
    parser.add_argument("--tokens", type=int, default=2048, help="for calibration")
    parser.add_argument("--evaluation-tokens", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--mha-ratio", default="0.33")
    parser.add_argument("--mlp-ratio", default="0.3")
    parser.add_argument(
        "--commands",
        nargs="+",
        choices=COMMANDS,
        default=list(COMMANDS),
        help="apply repeats what prune has written",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where the models are written")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
        for line in measured(chosen, Path(place)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
