"""Scores of tasks in an output folder: `tasks` of `report.json`, and a table in the model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transact_core.base.errors import TransActError
from transact_core.base.files import disk_trouble, read_text, staged_file

HEADING = "## Tasks"
NEXT = "Method: "
"""How the paragraph of the model card begins that the table comes before."""
TRAINED_HEADING = "## Trained after the cut"
"""Of the section of the model card that `export.tune` writes. What stands above it is about the cut
before the training, so the table of a trained cut comes after it, at the end."""


def require_output_folder(folder: Path) -> None:
    """Refuses a folder that scores cannot be written into; also called before they are measured.

    Raises:
        TransActError: it is not one that `prune` has written.
    """
    _read(folder)


def record_tasks(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes scores into an output folder, in place of those that it may have.

    `result` is what `tasks.json` holds: `experiments.tasks.tasks_report`.

    Raises:
        TransActError: the folder is not an output folder, or cannot be written.
    """
    report, card = _read(folder)
    of_cut, heading, of_trained = card.partition(f"\n{TRAINED_HEADING}\n")
    if heading:
        kept = of_trained.partition(f"\n{HEADING}\n")[0]
        card = f"{of_cut}{heading}{kept}\n{section(result, 'trained')}"
    else:
        before, _, after = card.partition(f"\n{NEXT}")
        before = before.partition(f"\n{HEADING}\n")[0]
        card = f"{before}\n{section(result)}\n{NEXT}{after}"
    text = json.dumps({**report, "tasks": result}, indent=1) + "\n"
    try:
        for name, content in (("README.md", card), ("report.json", text)):
            with staged_file(folder / name) as staging:
                staging.write_text(content, encoding="utf-8")
    except OSError as error:
        raise TransActError(
            f"The scores were not written into {folder}: "
            f"{disk_trouble(error) or error.strerror or error}."
        ) from None


def section(result: Mapping[str, Any], model: str = "pruned") -> str:
    """The scores as a section of the model card; `model` is what the one that is not dense is."""
    lines = [
        HEADING,
        "",
        f"| task | metric | n | dense | {model} | {model} − dense |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, entry in result["tasks"].items():
        pruned, dense = entry["model"], entry.get("against", {})
        for metric in (key for key in pruned if f"{key}_stderr" in pruned):
            cells = (_cell(side, metric) for side in (dense, pruned, entry.get("difference", {})))
            shots = f" ({entry['few_shot']}-shot)" if entry["few_shot"] else ""
            lines.append(f"| {name}{shots} | {metric} | {pruned['n']} | {' | '.join(cells)} |")
    chance = ", ".join(
        f"{name} {entry['chance']:.2f}"
        for name, entry in result["tasks"].items()
        if entry["chance"] is not None
    )
    guessing = f" Guessing gives an accuracy of: {chance}." if chance else ""
    return "\n".join(
        [
            *lines,
            "",
            f"± is one standard error; differences are paired, question by question.{guessing}",
            f"lm-evaluation-harness {result['versions']['lm_eval']}, questions drawn with seed "
            f"{result['seed']}.",
            "",
        ]
    )


def _cell(figures: Mapping[str, Any], metric: str) -> str:
    value, error = figures.get(metric), figures.get(f"{metric}_stderr")
    if value is None:
        return ""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """`report.json` and the model card of an output folder."""
    try:
        report = json.loads(read_text(folder / "report.json"))
        card = read_text(folder / "README.md")
        if "pruned" in report and f"\n{NEXT}" in card:
            return report, card
    except (OSError, ValueError, TypeError):
        pass
    raise TransActError(
        f"{folder} is not a folder that prune has written, so the scores cannot be recorded there; "
        "leave --record out."
    )
