import threading
from types import SimpleNamespace

import pytest
import torch

from pages.shared.jobs import CANCELLED, DONE
from pages.shared.workbench import Request, Workbench


@pytest.fixture
def workbench(monkeypatch):
    """One whose bench is a stub that waits until it is let through."""
    threads = torch.get_num_threads()
    made = Workbench()
    made.gate, made.measured = threading.Event(), []

    class Bench:
        loaded = SimpleNamespace(released=False)

        def dense(self, report):
            made.measured.append(1)

    def open_bench(request, report):
        made.gate.wait(10)
        return Bench()

    monkeypatch.setattr(made, "_bench", open_bench)
    yield made
    torch.set_num_threads(threads)


def wait_for(job):
    for _ in range(1000):
        if job.finished:
            return
        threading.Event().wait(0.01)
    pytest.fail("the job did not end")


def test_a_cancelled_dense_measurement_can_be_made_anew(workbench):
    opening = workbench.open(Request())
    opening.dense.cancel()
    workbench.gate.set()
    wait_for(opening.bench)
    assert (opening.dense.state, workbench.measured) == (CANCELLED, [])
    workbench.measure_dense(Request())
    wait_for(opening.dense)
    assert (opening.dense.state, workbench.measured) == (DONE, [1])
    assert workbench.open(Request()) is opening
