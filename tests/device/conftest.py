"""What is measured on a GPU, where there is one, and the file that the figures go to."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from transact_core.export.compression import package_versions
from transact_core.models.devices import hardware

NAMED = "TRANSACT_TEST_DEVICE"
"""The variable that names the device; `cpu` runs the same code on less text."""


def named_device() -> str | None:
    """The device that is measured on: the one that is named, or a GPU where there is one."""
    return os.environ.get(NAMED) or ("cuda" if torch.cuda.is_available() else None)


@pytest.fixture(scope="session")
def measured_on() -> torch.device:
    return torch.device(named_device())


class Figures:
    """Seconds, bytes and perplexities by what was done, and the GPU that they are from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, dict] = {
            "measured on": {
                "device": hardware([device]),
                "devices of this kind": torch.cuda.device_count() if device.type == "cuda" else 1,
                "threads": torch.get_num_threads(),
                **package_versions(),
            }
        }

    @contextmanager
    def of(self, what: str) -> Iterator[dict]:
        """Takes the time of a block and the GPU's peak memory in it; more may be added."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        added: dict[str, object] = {}
        start = time.perf_counter()
        yield added
        if on_gpu:
            torch.cuda.synchronize(self.device)
            added["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.found[what] = {"seconds": time.perf_counter() - start, **added}


@pytest.fixture(scope="session")
def figures(measured_on, tmp_path_factory) -> Iterator[Figures]:
    """Written to the folder OUT, or to pytest's own, as figures.json."""
    made = Figures(measured_on)
    yield made
    folder = os.environ.get("OUT")
    path = (Path(folder) if folder else tmp_path_factory.mktemp("figures")) / "figures.json"
    path.write_text(json.dumps(made.found, indent=1) + "\n")
    print(f"\nFigures of {made.found['measured on']['device']} in {path}")
