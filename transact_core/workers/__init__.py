"""Work in processes of its own: one process holds the open models of a device and does the work.

`process` starts such a process and talks to it, `serve` is the process, `tasks` and `open_models`
are what both ends share: what is asked for, and the models that it is done with. The functions that
can be asked for are in `work`.

Everything that passes between the two ends is pickled by value, nothing is in shared memory, so
that a worker may as well run on another machine. No page, no visitor and no scheduling is known
here: who has the next turn is decided by the app's server (`pages/server/jobs.py`).
"""
