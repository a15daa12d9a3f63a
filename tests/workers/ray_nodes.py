"""Nodes of a Ray cluster on this machine, for tests and the benchmark."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SECONDS_TO_START = 120
"""What a node may take until it has joined the cluster, on a busy machine."""
TOKEN = "a token of the tests alone, as long"
"""What the nodes know each other by; without one Ray would write one into the home folder."""


def ray_workers() -> list[psutil.Process]:
    """The processes of the workers on the nodes that this process runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # Others end meanwhile.
        with suppress(psutil.Error):
            if "ray::RayWorker" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


@contextmanager
def ray_nodes(cpus: Sequence[int], homes: Sequence[Path] = ()) -> Iterator[str]:
    """Runs a node for each number of CPUs, with these home folders; gives the cluster's address.

    What runs in the block finds the cluster's token in the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Paths of sockets are short, and pytest's folders are not.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    address = f"127.0.0.1:{port}"
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE")}
    os.environ |= {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"}
    try:
        with ExitStack() as nodes:
            for place, count in enumerate(cpus):
                chosen = ["--head", "--port", str(port), "--include-dashboard=false"]
                chosen += ["--temp-dir", str(folder)]
                options = ["--address", address] if place else chosen
                own = {"HOME": str(homes[place])} if homes else {}
                nodes.enter_context(_node(folder / f"{place}.txt", count, options, own))
            yield address
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _node(
    log: Path, cpus: int, options: Sequence[str], environment: dict[str, str]
) -> Iterator[None]:
    own = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    with log.open("w") as output:
        node = subprocess.Popen(
            [*command, "--num-cpus", str(cpus), "--object-store-memory", "100000000", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the node did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield
    finally:
        node.terminate()
        try:
            node.wait(timeout=30)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
