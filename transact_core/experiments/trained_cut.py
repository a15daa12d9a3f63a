"""A cut that was trained, as what stands for its weights: a checkpoint folder of its own.

What a measured cut is asked for, a trained one can be asked for too: tasks, damage to texts, files.
Its weights are read from its folder, where those of a measured cut can be made anew.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transact_core.data.corpus import short_name
from transact_core.experiments.bench import Bench, Measurement, identity
from transact_core.experiments.results import cut_identity
from transact_core.pruning.plan import PruningPlan


@dataclass(frozen=True)
class TrainedCut:
    """What its folder says of it; `export.tune.read_trained_cut` reads it."""

    folder: Path
    plan: PruningPlan = field(repr=False)
    recovery: str
    perplexity: float
    """On the first of the texts that it was measured on, of the weights as they are saved."""
    tokens: int
    """Trained on, in all its trainings."""
    text: str
    """The source that it was trained on last."""
    training: str
    """SHA-256 of the trainings' records, losses included; no other weights have these."""

    @property
    def identity(self) -> tuple:
        """As `Measurement.identity`; never that of a cut."""
        return *identity(self.plan, self.recovery), self.training

    @property
    def words(self) -> str:
        """How it was trained, as the end of a description of its cut."""
        return f"trained on {self.tokens:,} tokens"

    @property
    def words_with_text(self) -> str:
        """The same with the text."""
        return f"{self.words} of {short_name(self.text)}"


Subject = Measurement | TrainedCut
"""A model that is smaller than the dense one, and can be opened."""


def subject_identity(bench: Bench, subject: Subject) -> dict[str, object]:
    """All that determines the weights of a measured or a trained cut; JSON."""
    of_cut = cut_identity(bench, subject.plan, subject.recovery)
    if isinstance(subject, TrainedCut):
        return {**of_cut, "training": subject.training}
    return of_cut
