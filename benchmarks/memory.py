"""Peak resident memory of a process.

On Linux it is `VmHWM`, which belongs to the address space and starts at zero after `exec`.
`ru_maxrss` is not used there, as a child process starts with its parent's value.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

_STATUS = Path("/proc/self/status")
_WRAPPER = """
import atexit, runpy, sys
from pathlib import Path
from benchmarks.memory import peak_memory

report, module, *sys.argv[1:] = sys.argv[1:]
atexit.register(lambda: Path(report).write_text(str(peak_memory())))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_of(module: str, arguments: list[str]) -> int:
    """Peak resident bytes of `python -m module arguments` in a process of its own.

    Raises:
        CalledProcessError: it did not exit with status 0; its stderr is passed through.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "peak"
        subprocess.run(
            [sys.executable, "-c", _WRAPPER, str(report), module, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return int(report.read_text())
