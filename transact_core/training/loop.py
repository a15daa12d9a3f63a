"""The training loop: distil on windows of text, watch held-out texts, keep the best, go on later.

The loop is accelerate's: devices, mixed precision, several processes and trackers are its matter.
Everything that a step depends on follows from the settings and the number of the step, so a
training that was killed goes on from its last save with the same losses as one that was not.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from transact_core.base.cache import sha256_of_tokens
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.corpus import short_name
from transact_core.data.windows import Windows
from transact_core.training.objective import (
    LOSSES,
    LossName,
    Targets,
    mean_loss,
    token_losses,
)
from transact_core.training.state import Work
from transact_core.training.student import LORA_RANK, Method, Student
from transact_core.training.teacher import Teacher

TRAINING_TEXT = "training"
"""The name under which a teacher knows the windows that are trained on."""
LEARNING_RATES: dict[Method, float] = {"full": 1e-4, "lora": 1e-3}
WARMUP = 0.05
"""Share of the steps in which the learning rate rises; then it falls as a cosine."""
LAST_RATE = 0.1
"""Learning rate at the end, as a share of the highest."""
BETAS = (0.9, 0.95)
LONGEST_GRADIENT = 1.0
"""Gradients are scaled down to this norm."""
EVALUATIONS = 16
"""How often held-out texts are looked at, where no number of steps is given."""
PATIENCE = 4
"""Evaluations in a row without a better one after which training stops."""
SAVE_SECONDS = 60.0
"""A state is kept at each evaluation, and when the last one is older than this."""


class NotANumber(TransActError):
    """A held-out text has no divergence that is a number."""


@dataclass(frozen=True)
class Settings:
    """What decides a training beside its model, its teacher and its texts."""

    method: Method = "full"
    loss: LossName = "kl"
    tokens: int = 131_072
    """Tokens to train on; a text that is shorter is read again, shuffled anew."""
    learning_rate: float | None = None
    """The highest; None for that of the method in `LEARNING_RATES`."""
    windows_per_step: int = 4
    evaluate_every: int | None = None
    """Steps from one evaluation to the next; None for `EVALUATIONS` of them."""
    rank: int = LORA_RANK
    """Of LoRA's matrices."""
    seed: int = 0

    @property
    def highest_rate(self) -> float:
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    def steps(self, sequence_length: int) -> int:
        return self.tokens // (self.windows_per_step * sequence_length)

    def look_every(self, sequence_length: int) -> int:
        """Steps from one look at the held-out texts to the next; there is one after the last."""
        return self.evaluate_every or max(1, round(self.steps(sequence_length) / EVALUATIONS))

    def require(self, sequence_length: int) -> None:
        """Refuses settings that cannot be.

        Raises:
            TransActError: a sentence that names the setting.
        """
        if self.loss not in LOSSES:
            raise TransActError(f"The loss {self.loss!r} is none of {', '.join(LOSSES)}.")
        if not (math.isfinite(self.highest_rate) and self.highest_rate >= 0):
            raise TransActError(f"The learning rate {self.highest_rate:g} is no positive number.")
        if self.steps(sequence_length) < 1:
            raise TransActError(
                f"{self.tokens:,} tokens are fewer than one step of {self.windows_per_step} "
                f"windows of {sequence_length:,}; train on more tokens, or choose a shorter "
                "sequence length."
            )


@dataclass(frozen=True)
class HeldOut:
    """A text that is watched and never trained on."""

    name: str
    windows: Windows


@dataclass(frozen=True)
class Watched:
    """What one held-out text says at one step; means over its scored tokens, in nats."""

    kl: float
    """Divergence from the dense model."""
    nll: float


@dataclass(frozen=True)
class Evaluated:
    """A look at the held-out texts."""

    step: int
    texts: dict[str, Watched]

    @property
    def kl(self) -> float:
        """The mean divergence over the texts, by which the best is chosen."""
        return sum(text.kl for text in self.texts.values()) / len(self.texts)


@dataclass
class Curve:
    """What a training has shown by now; JSON by `asdict`."""

    losses: list[float] = field(default_factory=list)
    """By step, the mean over its tokens."""
    evaluated: list[Evaluated] = field(default_factory=list)
    dense_nll: dict[str, float] = field(default_factory=dict)
    """The dense model's mean NLL on each held-out text, in nats."""
    seconds: float = 0.0
    """Spent in training, evaluations included."""

    @property
    def best(self) -> Evaluated:
        return min(self.evaluated, key=lambda found: found.kl)

    def share_back(self, at: Evaluated, text: str) -> float | None:
        """Which share of the nats that the cut lost on a text is back; None where none were."""
        before = self.evaluated[0].texts[text].nll
        lost = before - self.dense_nll[text]
        return (before - at.texts[text].nll) / lost if lost > 0 else None

    def worse_since(self) -> int:
        """Evaluations since the best one."""
        return len(self.evaluated) - 1 - self.evaluated.index(self.best)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Curve":
        evaluated = [
            Evaluated(
                found["step"],
                {name: Watched(**text) for name, text in found["texts"].items()},
            )
            for found in stored["evaluated"]
        ]
        return cls(stored["losses"], evaluated, stored["dense_nll"], stored["seconds"])


@dataclass(frozen=True)
class Pace:
    """Tokens a second that a training was seen to take on this machine."""

    trained: float
    watched: float
    """Of the held-out texts, at each look."""

    def seconds_left(self, settings: Settings, length: int, watched: int, step: int = 0) -> float:
        """What is left after `step` takes; `watched` tokens of held-out texts are looked at."""
        steps, every = settings.steps(length), settings.look_every(length)
        looks = steps // every - step // every + (steps % every > 0 and step < steps)
        tokens = (steps - step) * settings.windows_per_step * length
        return tokens / self.trained + looks * watched / self.watched

    def tokens_in(self, seconds: float, settings: Settings, length: int, watched: int) -> int:
        """The tokens of as many whole steps as fit into a time, looks included; one at least."""
        of_step = settings.windows_per_step * length
        step, look = of_step / self.trained, watched / self.watched
        steps = (seconds - (EVALUATIONS + 1) * look) / step
        if steps < EVALUATIONS:
            # Each step is followed by a look, and one comes before the first.
            steps = (seconds - look) / (step + look)
        return max(1, int(steps)) * of_step


@dataclass(frozen=True)
class Standing:
    """Where a training is, after each step: what a page or a terminal shows."""

    step: int
    steps: int
    tokens: int
    """Trained on so far."""
    loss: float | None
    """Of the last step; None before the first."""
    learning_rate: float
    evaluated: Evaluated | None
    """Set where the held-out texts were looked at after this step."""
    share_back: dict[str, float | None]
    """By held-out text, at the last look; see `Curve.share_back`."""
    seconds_left: float | None
    """As it goes on at the pace so far."""
    dense_nll: dict[str, float] = field(default_factory=dict)
    """As `Curve.dense_nll`."""
    pace: Pace | None = None
    """Of the steps and looks since it was begun or taken up again; None before a step."""


@dataclass(frozen=True)
class Trained:
    """The outcome of a training; the student holds the best weights."""

    curve: Curve
    why: str
    """Why it ended, in a sentence."""

    @property
    def improved(self) -> bool:
        return self.curve.best.step > 0

    @property
    def step(self) -> int:
        return self.curve.best.step

    @property
    def sentence(self) -> str:
        """What came of it."""
        if not self.improved:
            return (
                "Nothing got better on the held-out texts, so the input comes back as it was: "
                "train on more tokens, at a lower learning rate, or on another text."
            )
        before, after = self.curve.evaluated[0].kl, self.curve.best.kl
        return (
            f"{self.why} The best weights are those of step {self.step} of "
            f"{len(self.curve.losses)}: mean held-out divergence {after:.4f} nats a token, "
            f"{before:.4f} before."
        )


def identity(
    settings: Settings,
    training: Windows,
    held_out: Sequence[HeldOut],
    weights: Mapping[str, str],
    teacher: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same for a training to go on from a kept state; JSON."""
    return {
        "settings": asdict(settings),
        "training": sha256_of_tokens(training.ids),
        "held_out": {text.name: sha256_of_tokens(text.windows.ids) for text in held_out},
        "weights": sorted(weights.values()),
        "teacher": sorted(teacher.values()),
    }


class Objective(nn.Module):
    """The student as a module that gives the loss, so that processes can share its gradient."""

    def __init__(self, student: Student, loss: LossName) -> None:
        super().__init__()
        self.model, self.loss = student.model, loss

    def forward(self, ids: torch.Tensor, targets: Targets | None) -> torch.Tensor:
        return mean_loss(self.model, ids, targets, self.loss)


def make_accelerator(device: torch.device, report_to: str, folder: Path) -> Accelerator:
    """accelerate's own object, for one process or as many as `torchrun` started.

    Raises:
        TransActError: the tracker is not installed.
    """
    on_cpu = device.type == "cpu"
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if on_cpu else "bf16",
            log_with=None if report_to == "none" else report_to,
            project_dir=folder,
        )
    except (ImportError, ValueError) as error:
        raise TransActError(
            f"Values cannot be reported to {report_to}: {' '.join(str(error).split())}"
        ) from None


def train(
    student: Student,
    teacher: Teacher,
    training: Windows,
    held_out: Sequence[HeldOut],
    settings: Settings,
    work: Work,
    same: dict[str, Any],
    progress: Progress = silent,
    finish: bool = False,
    report_to: str = "none",
) -> Iterator[Standing]:
    """Trains, and yields where it stands after each step; returns `Trained`.

    It goes on from what `work` holds. The student ends with the weights whose mean divergence over
    the held-out texts was lowest, which may be those that it began with. Where `progress` raises,
    the state is kept first.

    Args:
        same: As `identity` gives it; kept, and compared with what was kept.
        finish: Whether to train no further, and to end with the best so far.

    Raises:
        TransActError: a setting cannot be, the kept training is another one, a loss is not a
            number, or the disk is full.
    """
    length = training.sequence_length
    settings.require(length)
    steps = settings.steps(length)
    every = settings.look_every(length)
    device = student.model.device
    accelerator = make_accelerator(device, report_to, work.folder)
    processes, rank = accelerator.num_processes, accelerator.process_index
    if settings.windows_per_step % processes:
        raise TransActError(
            f"A step of {settings.windows_per_step} windows cannot be shared evenly by "
            f"{processes} processes; choose a multiple of it by --windows-per-step."
        )
    weights = student.trained()
    raw = torch.optim.AdamW(weights.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
    curve, step = Curve(), 0
    if accelerator.is_main_process:
        work.require_room(weights)
    if work.begun:
        kept = work.standing()
        if kept["same"] != same:
            raise TransActError(
                f"The training kept in {work.folder} has other settings, texts or weights; go on "
                "with the same ones, or remove the folder and start anew."
            )
        kept = work.restore(weights, raw)
        curve, step = Curve.from_json(kept["curve"]), kept["step"]
    module, optimizer = accelerator.prepare(Objective(student, settings.loss), raw)
    watch = _Watch(student, teacher, held_out, accelerator)
    if report_to != "none":
        accelerator.init_trackers("transact-tune", config=_flat(settings))
    began, before = time.perf_counter(), curve.seconds
    saved = time.perf_counter()
    watched = sum(text.windows.tokens for text in held_out)
    step_tokens = settings.windows_per_step * length
    steps_timed, step_seconds = 0, 0.0

    def save() -> None:
        nonlocal saved
        curve.seconds = before + time.perf_counter() - began
        if accelerator.is_main_process:
            work.save(weights, raw, {"step": step, "same": same, "curve": asdict(curve)})
        saved = time.perf_counter()

    def look() -> Evaluated:
        found = watch.look(step, progress)
        curve.evaluated.append(found)
        if curve.best is found and accelerator.is_main_process:
            work.save_best(weights, {"step": step, "kl": found.kl})
        save()
        if report_to != "none":
            values = {f"held-out KL, {name}": text.kl for name, text in found.texts.items()}
            accelerator.log(values, step=step)
        return found

    def standing(found: Evaluated | None) -> Standing:
        last = curve.evaluated[-1]
        pace = None
        if steps_timed:
            trained = steps_timed * step_tokens / step_seconds
            # Taken up again it has not looked yet, which takes no longer than training.
            pace = Pace(trained, watch.pace or trained)
        return Standing(
            step=step,
            steps=steps,
            tokens=step * step_tokens,
            loss=curve.losses[-1] if curve.losses else None,
            learning_rate=rate_at(step, steps, settings.highest_rate),
            evaluated=found,
            share_back={name: curve.share_back(last, name) for name in last.texts},
            seconds_left=pace and pace.seconds_left(settings, length, watched, step),
            dense_nll=curve.dense_nll,
            pace=pace,
        )

    if not curve.evaluated:
        curve.dense_nll = watch.dense(progress)
        yield standing(look())
    why = "All tokens were trained on."
    if finish:
        why = "It was ended before its tokens were used up."
        if step > curve.evaluated[-1].step:
            # The last steps may be the best; where they broke it, those before them are.
            with suppress(NotANumber):
                yield standing(look())
    student.model.train()
    while step < steps and not finish:
        if curve.worse_since() >= PATIENCE:
            why = f"The held-out texts did not get better in {PATIENCE} looks in a row."
            break
        try:
            progress("Training", step, steps)
        except BaseException:
            save()
            raise
        rows = rows_of_step(step, settings, len(training))[rank::processes]
        step_began = time.perf_counter()
        loss = take_step(
            module, optimizer, accelerator, teacher, training, rows, settings, steps, step
        )
        step_seconds += time.perf_counter() - step_began
        steps_timed += 1
        if not math.isfinite(loss):
            raise TransActError(
                f"The loss is not a number after step {step}; choose a lower --learning-rate. The "
                f"best weights so far are kept in {work.folder}, and --resume --finish writes them."
            )
        curve.losses.append(loss)
        step += 1
        if report_to != "none":
            accelerator.log({"loss": loss}, step=step)
        due = step % every == 0 or step == steps
        found = look() if due else None
        if not due and _late(accelerator, saved):
            save()
        yield standing(found)
    progress("Training", step, steps)
    accelerator.wait_for_everyone()
    if report_to != "none":
        accelerator.end_training()
    work.restore_best(weights)
    student.model.eval()
    curve.seconds = before + time.perf_counter() - began
    return Trained(curve, why)


def rate_at(step: int, steps: int, highest: float) -> float:
    """The learning rate of a step, counted from 0: it rises linearly, then falls as a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return highest * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return highest * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * along)) / 2)


def rows_of_step(step: int, settings: Settings, windows: int) -> list[int]:
    """Which windows a step trains on: every window once before any comes again, in an order drawn
    anew each time."""
    rows = []
    first = step * settings.windows_per_step
    for place in range(first, first + settings.windows_per_step):
        again, within = divmod(place, windows)
        drawn = torch.Generator().manual_seed((settings.seed + 1_000_003 * again) % 2**63)
        rows.append(int(torch.randperm(windows, generator=drawn)[within]))
    return rows


def take_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    teacher: Teacher,
    training: Windows,
    rows: Sequence[int],
    settings: Settings,
    steps: int,
    step: int,
) -> float:
    """One step of the optimiser; gives the mean loss over the windows of all processes."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, steps, settings.highest_rate)
    total = torch.zeros((), device=accelerator.device)
    batches = _batches(rows, training.sequence_length, accelerator.device)
    for index, batch in enumerate(batches):
        ids = training.ids[batch].long().to(accelerator.device)
        with accelerator.autocast():
            targets = None
            if settings.loss != "ce":
                targets = teacher.targets(TRAINING_TEXT, batch, ids)
            # Processes share the gradient once, after their last window.
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(module):
                loss = module(ids, targets) * (len(batch) / len(rows))
                accelerator.backward(loss)
        total += loss.detach()
    total = accelerator.reduce(total, "mean")
    if total.isfinite():
        accelerator.clip_grad_norm_(module.parameters(), LONGEST_GRADIENT)
        optimizer.step()
    optimizer.zero_grad()
    return float(total)


TOKENS_AT_ONCE, TOKENS_AT_ONCE_ON_DEVICE = 512, 2048
"""Tokens that run through the model together, on the CPU and on a GPU, which needs many of them to
be busy; one window where it is longer."""


def windows_at_once(length: int, device: torch.device) -> int:
    """Windows of `length` tokens that run through the model together."""
    tokens = TOKENS_AT_ONCE if device.type == "cpu" else TOKENS_AT_ONCE_ON_DEVICE
    return max(1, tokens // length)


def _batches(rows: Sequence[int], length: int, device: torch.device) -> list[list[int]]:
    """Rows of windows of `length` tokens, so many together as run together."""
    at_once = windows_at_once(length, device)
    return [list(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]


def _late(accelerator: Accelerator, saved: float) -> bool:
    """Whether it is time to save, the same in every process."""
    late = torch.tensor(float(time.perf_counter() - saved > SAVE_SECONDS))
    return bool(accelerator.reduce(late.to(accelerator.device), "sum") > 0)


def _flat(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if value is not None}


class _Watch:
    """Looks at the held-out texts; what the teacher says of them is asked once."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        held_out: Sequence[HeldOut],
        accelerator: Accelerator,
    ) -> None:
        self.model, self.teacher = student.model, teacher
        self.held_out, self.accelerator = held_out, accelerator
        self._targets: dict[tuple[str, int], Targets] = {}
        self._tokens, self._seconds = 0, 0.0

    @property
    def pace(self) -> float | None:
        """Tokens a second of the looks so far, the teacher's part aside; None before one."""
        return self._tokens / self._seconds if self._seconds else None

    def dense(self, progress: Progress) -> dict[str, float]:
        """The dense model's mean NLL on each text."""
        means = {}
        for text in self.held_out:
            total = 0.0
            for rows, ids in self._batches(text, range(len(text.windows))):
                progress("Measuring the dense model", rows[0], len(text.windows))
                total += self.teacher.nll(text.name, rows, ids).double().mean().item() * len(rows)
            means[text.name] = total / len(text.windows)
        return means

    def _batches(
        self, text: HeldOut, rows: Sequence[int]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Rows of a text that are looked at together, and their token ids."""
        device = self.accelerator.device
        for batch in _batches(rows, text.windows.sequence_length, device):
            yield batch, text.windows.ids[batch].long().to(device)

    def look(self, step: int, progress: Progress) -> Evaluated:
        """Divergence and NLL on each text; processes share the windows."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        training = self.model.training
        self.model.eval()
        found = {}
        for text in self.held_out:
            sums = torch.zeros(2, dtype=torch.float64)
            mine = range(rank, len(text.windows), processes)
            for rows, ids in self._batches(text, mine):
                progress(f"Looking at {short_name(text.name)}", rows[0], len(text.windows))
                key = text.name, rows[0]
                with self.accelerator.autocast():
                    if key not in self._targets:
                        self._targets[key] = self.teacher.targets(text.name, rows, ids)
                    # Others may have their turn in `progress`, so that it is left out.
                    began = time.perf_counter()
                    losses = token_losses(self.model, ids, self._targets[key])
                sums[0] += losses.kl.double().mean().item() * len(rows)
                sums[1] += losses.nll.double().mean().item() * len(rows)
                self._seconds += time.perf_counter() - began
                self._tokens += ids.numel()
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()
            kl, nll = (sums / len(text.windows)).tolist()
            found[text.name] = Watched(kl, nll)
        self.model.train(training)
        if not all(math.isfinite(text.kl) for text in found.values()):
            raise NotANumber(
                "The divergence on a held-out text is not a number; choose a lower --learning-rate."
            )
        return Evaluated(step, found)
