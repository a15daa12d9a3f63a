import subprocess
import sys

import pytest

KEEPING = """
import sys
import torch
from transact_core.base.memory import give_large_blocks_back

if sys.argv[1] == "give back":
    give_large_blocks_back()

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000

torch.ones(5_500_000)  # Freed at once, after which blocks of this size come from the heap.
before, pins = resident(), []
blocks = []
for _ in range(20):
    blocks.append(torch.ones(5_000_000))
    pins.append(torch.ones(10_000))
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
@pytest.mark.parametrize(("how", "least", "most"), [("give back", -100, 50), ("keep", 200, 500)])
def test_large_blocks_go_back_to_the_system_when_they_are_freed(how, least, most):
    """400 MB in blocks of 20 MB, which the C library would keep."""
    ran = subprocess.run(
        [sys.executable, "-c", KEEPING, how], capture_output=True, text=True, check=True
    )
    assert least < float(ran.stdout) < most
