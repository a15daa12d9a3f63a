"""Imports torch, transformers and the modules that need them, in one thread, after the first page.

These imports take seconds, and the first page needs none of them. One thread does them for the
whole server: the lazy imports of transformers fail now and then when two threads meet in them, so
no session imports what `loaded` has not found ready.
"""

import logging
import threading

from transact_core.workers.process import WorkerProcess

_lock = threading.Lock()
_thread: threading.Thread | None = None
_error: str | None = None
_done = False
_first_worker: WorkerProcess | None = None


def start(with_worker: bool = True) -> None:
    """Begins the imports, unless they have begun or are done. After a failure it tries again.

    The first worker's process begins its imports at the same time, unless told otherwise.
    """
    global _thread, _error
    with _lock:
        if _thread is None or _error is not None:
            _error = None
            if with_worker:
                _start_worker()
            _thread = threading.Thread(target=_import, name="imports", daemon=True)
            _thread.start()


def _start_worker() -> None:
    global _first_worker
    if _first_worker is None:
        _first_worker = WorkerProcess()
        _first_worker.start()


def new_worker() -> WorkerProcess:
    """A worker for a device; the first one has begun its imports with those of this process."""
    global _first_worker
    with _lock:
        worker, _first_worker = _first_worker or WorkerProcess(), None
        return worker


def loaded() -> bool:
    """Whether the imports are done, so that a session may import any module of the app."""
    return _done


def failure() -> str | None:
    """What an import failed with, as "ImportError: …"; None while none has."""
    return _error


def wait() -> None:
    """Begins the imports if nobody has, and returns when they have ended; for tests and scripts."""
    start(with_worker=False)
    _thread.join()


def _import() -> None:
    global _done, _error
    try:
        from transformers import LlamaForCausalLM  # noqa: F401

        # With these come all of transact_core that any page uses.
        import pages.server.exploring
        import pages.server.side_by_side
        import pages.server.start_jobs
        import pages.server.task_runs  # noqa: F401
    except BaseException as error:
        logging.getLogger(__name__).exception("The libraries could not be imported")
        _error = f"{type(error).__name__}: {error}"
    else:
        _done = True
