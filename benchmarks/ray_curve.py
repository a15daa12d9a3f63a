"""Time of a curve on a Ray cluster of two workers on this machine, against one process.

    python -m benchmarks.ray_curve      # needs `make ray`; takes some ten minutes

Both are the command `sweep`, with one thread for each process that computes, from its start to its
end and with an empty cache; the cluster runs already, as a cluster does. The points of both are
compared.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.workers.ray_nodes import ROOT, ray_nodes
from transact_core.base.files import cache_folder

WORKERS = 2
GRID = ["--mha-ratio", "0.1,0.33", "--mlp-ratio", "0.1,0.2,0.3,0.5"]
"""Eight points."""
CONVERTED = cache_folder() / "models"
"""Where models that were converted from GGUF lie."""


def swept(folder: Path, model: str, tokens: int, *options: str) -> tuple[float, list[str]]:
    """Seconds of a sweep, and its lines without the seconds of each point."""
    output = folder / "points.csv"
    command = [sys.executable, "-m", "transact_core", "sweep", "--model", model, *GRID]
    command += ["--calibration-tokens", str(tokens), "--evaluation-tokens", str(tokens)]
    command += ["--output", str(output), "--device", "cpu", *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRANSACT_CACHE": str(empty_cache(folder / "cache")),
    }
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    seconds = time.perf_counter() - began
    return seconds, [line.rpartition(",")[0] for line in output.read_text().splitlines()]


def empty_cache(folder: Path) -> Path:
    """A new cache folder, in which there are only the models that were converted before."""
    folder.mkdir(parents=True)
    if CONVERTED.is_dir():
        (folder / "models").symlink_to(CONVERTED)
    return folder


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="builtin", help="as `sweep` takes it")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="calibration and evaluation tokens"
    )
    chosen = parser.parse_args()
    print(f"Load of the machine before: {psutil.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        here, plain = swept(Path(folder) / "here", chosen.model, chosen.tokens)
        print(f"One process: {here:.1f} s")
        # Workers keep what they measure in a cache of their own, which is empty too.
        os.environ["TRANSACT_CACHE"] = str(empty_cache(Path(folder) / "workers"))
        with ray_nodes([WORKERS]) as address:
            there, with_ray = swept(
                Path(folder) / "there", chosen.model, chosen.tokens, "--ray", address
            )
    print(f"{WORKERS} workers on Ray: {there:.1f} s, {there / here:.2f} × the time")
    same = "the same" if plain == with_ray else "NOT the same"
    print(f"The {len(plain) - 1} points are {same}.")


if __name__ == "__main__":
    main()
