"""Runs of tasks as jobs: their pieces take turns with other jobs, and what they found is kept."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.points import subject_of
from pages.server.request import Cut
from pages.server.settings import require_readable, require_readable_text, settings
from pages.server.start_jobs import start
from pages.server.visits import holding, points, visit
from transact_core.base.errors import Progress
from transact_core.experiments.bench import identity
from transact_core.experiments.task_data import TaskChoice
from transact_core.experiments.tasks import Standing, tasks_report
from transact_core.experiments.trained_cut import TrainedCut
from transact_core.pruning.plan import PruningPlan
from transact_core.workers import work


@dataclass
class TaskRun:
    """What a run of tasks has found. A job writes it while the page reads it."""

    cut: Cut | None
    """None where the dense model answers alone."""
    choice: TaskChoice
    trained: TrainedCut | None = None
    """What the cut became by training, where that is what answers."""
    job: Job | None = None
    plan: PruningPlan | None = None
    """Of the cut, once it is made."""
    history: dict[str, list[Standing]] = field(default_factory=dict)
    """For each task its standing after each block, without the answers."""

    @property
    def standings(self) -> dict[str, Standing]:
        """The last of each task."""
        return {task: after[-1] for task, after in list(self.history.items())}

    def keep(self, standing: Standing) -> None:
        """Adds a standing; one that is known comes again where a run began anew."""
        known = self.history.setdefault(standing.task, [])
        if not known or standing.asked > known[-1].asked:
            known.append(standing)

    def is_of(self, plan: PruningPlan, recovery: str) -> bool:
        """Whether this cut answered, as it was before any training."""
        mine = self.plan and self.cut and identity(self.plan, self.cut.recovery)
        return self.trained is None and mine == identity(plan, recovery)

    def report(self) -> dict[str, object]:
        """What `tasks.json` holds."""
        return tasks_report(self.standings, self.choice.seed, self.choice.limit)


def last_tasks() -> TaskRun | None:
    """The visitor's last run of tasks with the model and texts in view."""
    return holding().found.get("tasks")


def tasks_of(plan: PruningPlan, recovery: str) -> TaskRun | None:
    """The last run of tasks, where this cut answered a question in it."""
    run = last_tasks()
    return run if run and run.history and run.is_of(plan, recovery) else None


def tasks_of_trained(trained: TrainedCut) -> TaskRun | None:
    """The last run of tasks, where this trained cut answered a question in it."""
    run = last_tasks()
    return run if run and run.history and run.trained == trained else None


def start_tasks(cut: Cut | None, choice: TaskChoice, trained: TrainedCut | None = None) -> None:
    """Queues a run of tasks by the dense model and a cut, or by the dense model alone.

    With `trained` it is what the cut became by training that answers.

    Each block's standing is added as soon as it is scored. Between pieces other jobs have their
    turn. What was scored before, also by a run that was stopped, comes at once.
    """
    request, known = visit().request, points()
    run, name = TaskRun(cut, choice, trained), secrets.token_hex(8)

    def answering(report: Progress) -> Iterator[tuple[int, int]]:
        allowed = choice
        require_readable_text(choice.text, settings())
        if choice.folder is not None:
            folder = require_readable(choice.folder, settings())
            allowed = replace(choice, folder=str(folder))
        # Before the cut is measured, which may take long: the tasks may be refused.
        workbench().run(request, work.require_tasks, report, allowed)
        subject = None
        if cut is not None:
            subject = subject_of(cut, trained, request, known, report)
            run.plan = subject.plan
        done, total = 0, 1
        while done < total:
            done, total = workbench().run(
                request, work.answer, report, subject, allowed, name, received=run.keep
            )
            yield done, total

    run.job = start("Running tasks", answering, ("tasks", request))
    holding().found["tasks"] = run
