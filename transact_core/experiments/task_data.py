"""Where the questions of a task come from: a folder of files, the hub, or a text of one's own."""

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transact_core.base.errors import Progress, TransActError, first_line, silent
from transact_core.base.files import expanded
from transact_core.data.corpus import BUILTIN_TEXT, HUB_TIMEOUT_S, Corpus, read_corpus
from transact_core.data.own_text import CONTINUATION, LAST_WORD, OWN_TEXT_TASKS, own_text_rows
from transact_core.experiments.harness import (
    Config,
    HarnessTask,
    Rows,
    as_dataset,
    config_sha256,
    make_task,
    require_harness,
    stock_config,
)
from transact_core.models.hub import access_refusal

BLIMP = "blimp"
"""The name of the 67 paradigms of BLiMP together: tasks with one configuration, a row naming its
own by its column `UID`."""
READY_MADE = {"hellaswag": ("query", "choices", "label")}
"""Columns of rows that a task's `process_docs` has been applied to already."""
DEFAULT_SUITE = ("piqa", "arc_easy", "openbookqa", "lambada_openai", "winogrande")
"""Common sense, knowledge and the last words of stories; some twenty minutes on two cores for a
model of 135 M parameters and a cut of it, with 500 questions each."""
PAPER_SUITE = {
    "wikitext": 0,
    "lambada_standard": 0,
    "arc_easy": 0,
    "boolq": 0,
    "logiqa": 0,
    "openbookqa": 0,
    "piqa": 0,
    "truthfulqa_mc1": 0,
    "truthfulqa_mc2": 0,
    "arc_challenge": 25,
    "hellaswag": 10,
    "winogrande": 5,
}
"""Tasks and their numbers of examples in the TransAct paper (Shen et al. 2024, section 4.1)."""
OWN_TEXT_CONFIGS: dict[str, Config] = {
    CONTINUATION: {
        "task": CONTINUATION,
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "continuations",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    },
    LAST_WORD: {
        "task": LAST_WORD,
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    },
}
"""Configurations as the harness' YAML files have them."""


@dataclass(frozen=True)
class TaskSpec:
    """A task and how many examples are shown before each of its questions."""

    name: str
    shots: int = 0


@dataclass(frozen=True)
class TaskChoice:
    """Which questions are to be put, as a value; the fields are as in `open_tasks`."""

    names: str | None = None
    limit: int | None = None
    shots: int | None = None
    folder: str | None = None
    text: str = BUILTIN_TEXT
    seed: int = 0

    def open(self, progress: Progress = silent) -> list[HarnessTask]:
        """What `open_tasks` gives for it."""
        folder = None if self.folder is None else Path(self.folder)
        return open_tasks(
            self.names, self.limit, self.shots, folder, self.text, self.seed, progress
        )


def chosen_tasks(
    names: str | None, folder: Path | None = None, shots: int | None = None
) -> list[TaskSpec]:
    """The tasks that were asked for: names with commas between them, or `default` or `paper`.

    `paper` is the list of the TransAct paper with its numbers of examples. `default`, and no name,
    are `DEFAULT_SUITE`, of which a folder may have a part; without a folder no name is the tasks
    from one's own text, which need no data. `shots` overrides the numbers of examples.

    Raises:
        TransActError: no task is named, one is named twice, or the folder has none of the suite.
    """
    if names is None and folder is None:
        names = ",".join(OWN_TEXT_TASKS)
    if names == "paper":
        specs = [TaskSpec(name, own) for name, own in PAPER_SUITE.items()]
    elif names in (None, "default"):
        there = DEFAULT_SUITE if folder is None else tasks_in(folder)
        specs = [TaskSpec(name) for name in DEFAULT_SUITE if name in there]
        if not specs:
            raise TransActError(
                f"The folder {folder} has none of the tasks {', '.join(DEFAULT_SUITE)}; name tasks "
                f"that it has: {', '.join(there) or 'it has none'}."
            )
    else:
        specs = [TaskSpec(name.strip()) for name in names.split(",") if name.strip()]
    if not specs or len({spec.name for spec in specs}) < len(specs):
        raise TransActError("Name at least one task, and none twice, with commas between them.")
    return specs if shots is None else [TaskSpec(spec.name, shots) for spec in specs]


@dataclass(frozen=True)
class TaskData:
    """A task with all its rows; nothing is drawn yet."""

    name: str
    config: Config = field(repr=False)
    rows: Rows = field(repr=False)
    source: str
    """Where the rows come from, in words."""
    sha256: str
    """Of the rows and of the examples."""
    config_sha256: str = field(repr=False)
    examples: Rows = field(default=(), repr=False)
    """What few-shot examples are drawn from."""


def read_task(
    name: str,
    shots: int = 0,
    folder: Path | None = None,
    corpus: Corpus | None = None,
    seed: int = 0,
) -> TaskData:
    """The rows of a task: of a text, of files `NAME.jsonl` in a folder, or of the hub.

    `corpus` is what the tasks from one's own text are made of. With `shots`, rows to draw examples
    from are read as well: `NAME.train.jsonl` in the folder.

    Raises:
        TransActError: there is no such task, or its data are not there or not readable.
    """
    if name in OWN_TEXT_TASKS:
        if shots:
            raise TransActError(f"The task {name} has no examples to show; leave --few-shot out.")
        if corpus is None:
            raise TransActError(f"The task {name} needs a text.")
        config = OWN_TEXT_CONFIGS[name]
        return _data(name, config, own_text_rows(name, corpus, seed), (), corpus.source)
    if folder is not None:
        return _from_folder(name, shots, folder)
    return _from_hub(name, shots)


def draw(count: int, limit: int | None, seed: int) -> list[int]:
    """Which rows are asked, in the order in which they are: fewer are the first of more."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order[:limit]


def task_of(
    data: TaskData, shots: int, limit: int | None, seed: int, progress: Progress = silent
) -> HarnessTask:
    """The task with `limit` of its questions, or all of them, drawn with the seed.

    Raises:
        TransActError: the rows are not of the columns that the task reads.
    """
    numbers = draw(len(data.rows), limit, seed)
    identity = {"task": data.name, "config": data.config_sha256, "data": data.sha256}
    return make_task(
        data.name, data.config, data.rows, numbers, shots, data.examples, seed, identity, progress
    )


def open_tasks(
    names: str | None,
    limit: int | None = None,
    shots: int | None = None,
    folder: Path | None = None,
    text: str | Corpus = BUILTIN_TEXT,
    seed: int = 0,
    progress: Progress = silent,
) -> list[HarnessTask]:
    """The tasks that were asked for, with their questions drawn and their prompts made.

    `names`, `folder` and `shots` are as in `chosen_tasks`; `text` is what the tasks from one's own
    text are made of, as a source or read already. Nothing is computed with a model.

    Raises:
        TransActError: lm_eval is not installed, or a task or its data cannot be read.
    """
    require_harness()
    specs = chosen_tasks(names, folder, shots)
    corpus = None
    if any(spec.name in OWN_TEXT_TASKS for spec in specs):
        corpus = text if isinstance(text, Corpus) else read_corpus(text)
    # All data are read before any prompt is made: a wrong name is found at once.
    data = [read_task(spec.name, spec.shots, folder, corpus, seed) for spec in specs]
    return [
        task_of(read, spec.shots, limit, seed, progress)
        for read, spec in zip(data, specs, strict=True)
    ]


def _data(
    name: str, config: Config, rows: Rows, examples: Rows, source: str, processed: bool = False
) -> TaskData:
    sha256 = config_sha256(config)
    text = json.dumps([list(rows), list(examples)], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    process = config.get("process_docs")
    if process is not None:
        if not processed:
            try:
                rows, examples = (
                    list(process(as_dataset(part))) if part else part for part in (rows, examples)
                )
            except Exception as error:
                raise TransActError(
                    f"The data of the task {name} do not have the columns that the stock task "
                    f"reads ({type(error).__name__}: {first_line(error)})."
                ) from None
        config = {key: value for key, value in config.items() if key != "process_docs"}
    return TaskData(name, config, rows, source, digest, sha256, examples)


# --- a folder --------------------------------------------------------------------------------


def tasks_in(folder: Path) -> list[str]:
    """The names of the files of rows in a folder, without `.jsonl`.

    Raises:
        TransActError: the folder cannot be read.
    """
    try:
        names = sorted(path.stem for path in folder.glob("*.jsonl"))
        if not folder.is_dir():
            raise NotADirectoryError(20, "it is no folder")
    except OSError as error:
        raise TransActError(
            f"The folder of task data {folder} cannot be read: {error.strerror or error}."
        ) from None
    return [name for name in names if not name.endswith(".train")]


def _from_folder(name: str, shots: int, folder: Path) -> TaskData:
    folder = expanded(str(folder))
    names = tasks_in(folder)
    file = name
    if name == BLIMP and name not in names:
        # The paradigms in one file, whatever was made of its name.
        file = next((found for found in names if found.startswith(f"{BLIMP}_")), name)
    if file not in names:
        raise TransActError(
            f"The folder {folder} has no {file}.jsonl; it has data of "
            f"{', '.join(names) or 'no task'}."
        )
    path = folder / f"{file}.jsonl"
    rows = _read_rows(path)
    examples: Rows = ()
    if shots:
        train = folder / f"{file}.train.jsonl"
        if not train.is_file():
            raise TransActError(
                f"{shots} examples are to be shown for the task {name}, and {train} is not there; "
                "put rows of the training split into it, or leave --few-shot out."
            )
        examples = _read_rows(train)
    config = _config_of(name, rows)
    processed = set(READY_MADE.get(name, ("",))) <= set(rows[0])
    return _data(name, config, rows, examples, str(path), processed)


def _config_of(name: str, rows: Rows) -> Config:
    """The stock configuration, which for BLiMP is that of every paradigm in the rows."""
    paradigms = sorted({str(row["UID"]) for row in rows if "UID" in row})
    if not name.startswith(BLIMP) or not paradigms:
        return stock_config(name)
    configs = [stock_config(f"{BLIMP}_{paradigm}") for paradigm in paradigms]
    own = ("task", "dataset_name")
    same = [{key: config[key] for key in config if key not in own} for config in configs]
    if any(config != same[0] for config in same):
        raise TransActError("The stock tasks of BLiMP differ in more than their data; name one.")
    return {**same[0], "task": name}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise TransActError(f"Line {number} of {path} is no object.")
                    rows.append(row)
    except OSError as error:
        raise TransActError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise TransActError(f"Line {len(rows) + 1} of {path} is not JSON in UTF-8.") from None
    if not rows:
        raise TransActError(f"{path} holds no rows.")
    return rows


# --- the hub ---------------------------------------------------------------------------------


def _from_hub(name: str, shots: int) -> TaskData:
    config = stock_config(name)
    path = config.get("dataset_path")
    split = config.get("test_split") or config.get("validation_split")
    wanted = [split]
    if shots:
        wanted.append(config.get("fewshot_split") or config.get("training_split"))
    if path is None or None in wanted:
        raise TransActError(f"The stock task {name} does not say which rows of which data it uses.")
    _require_dataset(name, path)
    from datasets import load_dataset

    options = dict(config.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)
    try:
        parts = [
            list(load_dataset(path, config.get("dataset_name"), split=part, **options))
            for part in wanted
        ]
    except Exception as error:
        raise TransActError(
            f"The data of the task {name} could not be read from the hub ({first_line(error)}); "
            f"put its rows as {name}.jsonl into a folder of task data (--task-data) and name that."
        ) from None
    return _data(name, config, parts[0], parts[1] if shots else (), f"hub:{path}:{split}")


def _require_dataset(task: str, path: str) -> None:
    """Asks the hub once, as `datasets` would try an unreachable one for half a minute.

    With HF_HUB_OFFLINE set nothing is asked: what the cache holds is used.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(path, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        reason = access_refusal(path, error, "dataset") or (
            f"The hub cannot be reached for the data of the task {task} ({first_line(error)}); "
            f"name a folder of task data (--task-data) with {task}.jsonl, or choose the tasks from "
            f"a text of your own: {', '.join(OWN_TEXT_TASKS)}."
        )
        raise TransActError(reason) from None
