"""Jobs that need the dense and a pruned model at once: generation, latency, token damage."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.points import point_of, subject_of
from pages.server.request import Cut
from pages.server.settings import require_readable_text, settings
from pages.server.start_jobs import start
from pages.server.visits import holding, points, visit
from transact_core.base.errors import Progress
from transact_core.experiments.bench import identity
from transact_core.experiments.side_by_side import DENSE, PRUNED, Said, TokenLosses
from transact_core.experiments.text_damage import TextDamage
from transact_core.experiments.trained_cut import TrainedCut
from transact_core.forward.generation import Sampling, Token
from transact_core.forward.in_llama_cpp import FileFigures
from transact_core.forward.latency import LatencyPoint
from transact_core.pruning.plan import PruningPlan
from transact_core.workers import work
from transact_core.workers.process import worker_threads


@dataclass
class Comparison:
    """One prompt continued by both models. A job writes it while the page reads it."""

    cut: Cut
    trained: TrainedCut | None = None
    """What the cut became by training, where that is what answers."""
    quantization: str | None = None
    """The type of the files that llama.cpp ran; None for transformers."""
    job: Job | None = None
    prompt_tokens: int | None = None
    """Known once the prompt is tokenised."""
    tokens: dict[str, list[Token]] = field(default_factory=lambda: {DENSE: [], PRUNED: []})
    answers: dict[str, str] = field(default_factory=lambda: {DENSE: "", PRUNED: ""})
    """The text of the tokens."""
    losses: dict[str, TokenLosses] = field(default_factory=dict)
    """By what they were measured on: `CONTINUATION`, and `TEXT`, the user's own without a chat
    template."""


@dataclass
class LatencyRun:
    """Timings of both models. A job writes them while the page reads them."""

    cut: Cut
    repeats: int
    decode: int
    threads: int
    quantization: str | None = None
    """As `Comparison` has it."""
    files: dict[str, FileFigures] = field(default_factory=dict)
    """What each file took in llama.cpp besides, by model."""
    job: Job | None = None
    plan: PruningPlan | None = None
    """Known once the pruned model is made."""
    points: list[LatencyPoint] = field(default_factory=list)

    def is_of(self, plan: PruningPlan, recovery: str) -> bool:
        """Whether the pruned model of this cut was timed."""
        mine = self.plan and identity(self.plan, self.cut.recovery)
        return mine == identity(plan, recovery)


@dataclass
class DamageRun:
    """Damage to texts. A job writes it while the page reads it."""

    cut: Cut
    sources: tuple[str, ...]
    trained: TrainedCut | None = None
    """What the cut became by training, where that is what is compared."""
    job: Job | None = None
    texts: list[TextDamage] = field(default_factory=list)


def last_damage() -> DamageRun | None:
    """The damage to texts that the visitor measured last with the model and texts in view."""
    return holding().found.get("damage")


def last_comparison() -> Comparison | None:
    """The visitor's last comparison with the model and texts in view."""
    return holding().found.get("compare")


def last_latency() -> LatencyRun | None:
    """The visitor's last timings with the model and texts in view."""
    return holding().found.get("latency")


def start_comparison(
    cut: Cut,
    trained: TrainedCut | None,
    text: str,
    chat: bool,
    max_new_tokens: int,
    sampling: Sampling,
    quantization: str | None = None,
) -> None:
    """Queues the continuation of a prompt by both models, and then their losses on the texts.

    With `trained` the pruned model is what the cut became by training. With `chat` the text is put
    into the model's chat template. With a `quantization` both run as files of that type in
    llama.cpp.
    """
    request, known = visit().request, points()
    comparison = Comparison(cut, trained, quantization)

    def keep(thing: Said | TokenLosses) -> None:
        if isinstance(thing, TokenLosses):
            comparison.losses[thing.on] = thing
        else:
            comparison.tokens[thing.model].append(thing.token)
            comparison.answers[thing.model] = thing.text

    def comparing(report: Progress) -> None:
        # Before the cut is measured, which may take long: the prompt may be refused.
        prompt = workbench().run(request, work.read_prompt, report, text, chat)
        comparison.prompt_tokens = len(prompt.ids)
        subject = subject_of(cut, trained, request, known, report)
        comparing = (work.compare_files, report, subject, quantization)
        workbench().run(
            request,
            *(comparing if quantization else (work.compare, report, subject)),
            prompt,
            max_new_tokens,
            sampling,
            received=keep,
        )

    comparison.job = start("Generating side by side", comparing, ("compare", request))
    holding().found["compare"] = comparison


def start_damage(
    cut: Cut, sources: Sequence[str], tokens: int, trained: TrainedCut | None = None
) -> None:
    """Queues the comparison of both models' predictions; each text is added once it is done.

    With `trained` it is what the cut became by training that is compared with the dense model.
    """
    request, known = visit().request, points()
    run = DamageRun(cut, tuple(sources), trained)

    def comparing(report: Progress) -> None:
        for source in run.sources:
            require_readable_text(source, settings())
        subject = subject_of(cut, trained, request, known, report)
        workbench().run(
            request,
            work.damage_texts,
            report,
            subject,
            run.sources,
            tokens,
            received=run.texts.append,
        )

    run.job = start("Comparing predictions", comparing, ("damage", request))
    holding().found["damage"] = run


def start_latency(
    cut: Cut,
    lengths: Sequence[int],
    decode: int,
    repeats: int,
    quantization: str | None = None,
) -> None:
    """Queues the timing of both models; the points of a length are added once it is timed.

    With a `quantization` both run as files of that type in llama.cpp, and their points are added
    at the end.
    """
    request, known = visit().request, points()
    run = LatencyRun(cut, repeats, decode, worker_threads(), quantization)

    def keep(found: LatencyPoint | dict[str, FileFigures]) -> None:
        if isinstance(found, dict):
            run.files.update(found)
        else:
            run.points.append(found)

    def timing(report: Progress) -> None:
        workbench().run(request, work.require_lengths, report, lengths, decode)
        point = point_of(cut, request, known, report)
        run.plan = point.plan
        timing = (work.time_files, report, point, quantization)
        workbench().run(
            request,
            *(timing if quantization else (work.time_both, report, point)),
            lengths,
            decode,
            repeats,
            received=keep,
        )

    run.job = start("Timing both models", timing, ("latency", request))
    holding().found["latency"] = run
