"""The paper's whole method: score, cut a part of the way, train, and again down to the width.

Each shot scores the model as it has become, cuts it by the schedule of `decide.schedule`, repairs
it on the calibration text and trains it by distillation from the dense model. Source: TransAct,
iterative pruning; repair between cut and training, and distillation as the loss, are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.decide import schedule
from transact_core.experiments.kept_shots import KeptShot, KeptShots
from transact_core.forward.perplexity import evaluate
from transact_core.importance.scores import Evidence, score
from transact_core.models.architecture import Architecture
from transact_core.pruning.on_disk import repaired_cut
from transact_core.pruning.plan import LayerPlan, Step, make_plan, widths
from transact_core.training.loop import HeldOut, Settings, Standing, Trained, identity, train
from transact_core.training.student import make_student
from transact_core.training.teacher import LiveTeacher


@dataclass(frozen=True)
class Shot:
    """One cut and its training."""

    step: Step
    """The widths and the perplexity behind the training."""
    settings: Settings
    training: Windows
    trained: Trained


def require_iterative(choices: Choices) -> None:
    """Refuses choices that a model trained in between cannot have.

    Raises:
        TransActError: the sentence names the choice.
    """
    if choices.granularity in ("auto", "head-dims"):
        raise TransActError(
            "Training between steps takes whole heads or groups; choose the granularity "
            "query-heads or kv-groups."
        )
    if choices.sequential:
        raise TransActError("Training between steps and --sequential exclude each other.")
    if choices.widths != "uniform":
        raise TransActError(
            "Training between steps cuts all layers alike; choose the widths uniform."
        )


def shares(training: Windows, shots: int) -> list[Windows]:
    """The windows of each shot, none of them in two, as even as they can be.

    Raises:
        TransActError: there are fewer windows than shots.
    """
    if len(training) < shots:
        raise TransActError(
            f"{len(training)} windows of training text are fewer than the {shots} steps; train on "
            "more tokens."
        )
    ends = [len(training) * shot // shots for shot in range(shots + 1)]
    return [replace(training, ids=training.ids[start:end]) for start, end in pairwise(ends)]


def prune_and_train(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    training: Windows,
    held_out: Sequence[HeldOut],
    settings: Settings,
    folder: Path,
    progress: Progress = silent,
) -> Iterator[Standing | Shot]:
    """Takes all steps; returns the trained model and the plan of what it keeps of the dense one.

    Yields where each training stands, and each shot when it is done. `settings.tokens` are split
    over the shots; the learning rate rises over them in even parts to the one that is set.

    Finished shots and the training under way are kept in `folder`, and it goes on from what is
    there, with the same bits as if it had never stopped. Kept shots are yielded again.

    Raises:
        TransActError: as `require_iterative`, `make_plan`, `train` and `KeptShots` do.
    """
    require_iterative(choices)
    dense, architecture = bench.loaded.model, bench.loaded.architecture
    targets = list(schedule(architecture, mha_ratio, mlp_ratio, choices))
    teacher = LiveTeacher(dense)
    teacher_files = bench.loaded.weight_files
    same = {
        "bench": bench.identity,
        "ratios": [mha_ratio, mlp_ratio],
        "choices": asdict(choices),
        "training": identity(settings, training, held_out, {}, teacher_files),
    }
    shots = KeptShots(folder, same)
    if shots.shots:
        last_shot = shots.shots[-1]
        current, plan, left = shots.model(dense.device), last_shot.plan, last_shot.left
    else:
        current, plan = dense, None
        left = (
            LayerPlan(
                kept_heads=tuple(range(architecture.num_attention_heads)),
                kept_channels=tuple(range(architecture.intermediate_size)),
            ),
        ) * architecture.num_hidden_layers
    for number, (target, part) in enumerate(
        zip(targets, shares(training, len(targets)), strict=True), start=1
    ):

        def report(stage: str, done: int, total: int, number: int = number) -> None:
            progress(f"Step {number} of {len(targets)}: {stage.lower()}", done, total)

        tokens = len(part) * part.sequence_length
        shot_settings = replace(
            settings,
            tokens=min(tokens, settings.tokens // len(targets)),
            learning_rate=settings.highest_rate * number / len(targets),
        )
        if number <= len(shots.shots):
            known = shots.shots[number - 1]
            yield Shot(known.step, shot_settings, part, known.trained)
            continue
        last = number == len(targets)
        own = choices if last else replace(choices, multiple_of=1, head_dim_multiple_of=1)
        wanted = widths(architecture, *target, own.granularity, own.multiple_of)
        shape = Architecture.from_model(current)
        scores = score(
            own.importance, Evidence(current, bench.calibration, shape, bench.seed, report)
        )
        plan = make_plan(
            shape,
            scores,
            own.importance,
            1 - wanted.num_attention_heads / shape.num_attention_heads,
            1 - wanted.intermediate_size / shape.intermediate_size,
            own.granularity,
            own.multiple_of,
        )
        model, _ = repaired_cut(
            current, plan, bench.calibration, choices.recovery, current.dtype, report
        )
        left = tuple(
            _composed(outer, inner) for outer, inner in zip(left, plan.layers, strict=True)
        )
        before = evaluate(model, bench.evaluation, report).perplexity
        student = make_student(model, settings.method, settings.rank, settings.seed)
        # The cut that it begins with follows from the rest.
        same_training = {
            "run": shots.same,
            **identity(shot_settings, part, held_out, {}, teacher_files),
        }
        trained: Trained = yield from train(
            student,
            teacher,
            part,
            held_out,
            shot_settings,
            shots.training(number),
            same_training,
            report,
        )
        current = student.merged()
        step = Step.of(
            Architecture.from_model(current),
            evaluate(current, bench.evaluation, report).perplexity,
            before_training=before,
            trained_tokens=len(trained.curve.losses)
            * settings.windows_per_step
            * part.sequence_length,
        )
        shots.keep(KeptShot(step, trained, plan, left), current)
        yield Shot(step, shot_settings, part, trained)
    # The last step's plan has the widths that are left, in the places of the model before it.
    whole = plan.model_copy(
        update={
            "mha_ratio": mha_ratio,
            "mlp_ratio": mlp_ratio,
            "head_dim_multiple_of": choices.head_dim_multiple_of,
            "layers": left,
        }
    )
    whole.check(architecture)
    return current, whole


def _composed(outer: LayerPlan, inner: LayerPlan) -> LayerPlan:
    """What two cuts in a row keep, in the places of the first one's model."""
    return LayerPlan(
        kept_heads=tuple(outer.kept_heads[head] for head in inner.kept_heads),
        kept_channels=tuple(outer.kept_channels[channel] for channel in inner.kept_channels),
    )
