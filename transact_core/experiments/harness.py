"""EleutherAI's lm-evaluation-harness: stock tasks, their prompts, their metrics, its tokenising.

A task is loaded from its own YAML file, since the harness' `TaskManager` would read all 14,000 of
them, and is given its rows in memory. The prompts are made once, in the order of the rows, on which
few-shot examples depend. What the harness would do with a model is left to
`forward.continuations`; neither its caches nor its seeding of the process' random numbers are used.

lm_eval is an optional package, imported when the first task is made.
"""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from transact_core.base.errors import INTERRUPTIONS, Progress, TransActError, first_line, silent
from transact_core.forward.continuations import Answer, Request

PACKAGE = "lm_eval"
REQUIREMENTS = ("lm_eval==0.4.13", "sacrebleu", "portalocker", "tabulate", "colorama", "lxml")
"""As in requirements-tasks.txt: without what lm_eval needs for tasks that are not run here."""
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""Output types of the tasks that can be run: those whose answers are given and are scored."""
AGGREGATIONS = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
"""How metrics over items can become one figure here; see `experiments.tasks.aggregate`."""
DEFAULT_AGGREGATIONS = {
    "acc": "mean",
    "acc_norm": "mean",
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
"""The harness' own, for metrics whose task names none."""

Rows = Sequence[Mapping[str, Any]]
Config = dict[str, Any]
Values = dict[str, float | tuple[float, float]]
"""A value for each metric; of a weighted one the value and its weight."""


@dataclass(frozen=True)
class Item:
    """One question of a task, with its prompt made."""

    number: int
    """Its place among the rows of the data."""
    choices: int
    """How many answers there are to choose from; 0 where the answer is written freely."""
    requests: tuple[Any, ...] = field(repr=False)
    """`lm_eval.api.instance.Instance`s."""

    @property
    def texts(self) -> list[list[str]]:
        """Context and continuation of each request, or the whole text where that is scored."""
        return [list(request.args) for request in self.requests]


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, with the questions to be put."""

    name: str
    items: tuple[Item, ...] = field(repr=False)
    aggregations: dict[str, str]
    """Metric to the name of its aggregation, one of `AGGREGATIONS`."""
    higher_is_better: dict[str, bool]
    shots: int
    task: Any = field(repr=False)
    version: str
    """Of the task, as its configuration gives it."""
    identity: dict[str, object] = field(repr=False, default_factory=dict)
    """What the questions were made of, beside their numbers; JSON."""

    def values(self, item: Item, answers: Sequence[Answer]) -> Values:
        """What the task's own metrics make of the answers to one question."""
        results: list[Any] = [(answer.log_likelihood, answer.is_greedy) for answer in answers]
        if self.task.OUTPUT_TYPE == "loglikelihood_rolling":
            results = [sum(answer.log_likelihood for answer in answers)]
        found = self.task.process_results(item.requests[0].doc, results)
        return {
            name: tuple(map(float, value)) if isinstance(value, tuple) else float(value)
            for name, value in found.items()
            if name in self.aggregations
        }


# --- the package -----------------------------------------------------------------------------


def require_harness() -> None:
    """Refuses to go on without lm_eval.

    Raises:
        TransActError: it is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise TransActError(
            "Tasks need the package lm_eval, which is not installed: run `make setup` in a clone, "
            f"or `pip install --no-deps {' '.join(REQUIREMENTS)}`."
        )
    # It warns of what is on purpose here, such as a model that is already in memory.
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)


def harness_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "absent"


# --- configurations --------------------------------------------------------------------------


def stock_config(name: str) -> Config:
    """The configuration of a stock task, from its own YAML file.

    Raises:
        TransActError: there is no stock task of that name, or it is of a kind that is not scored.
    """
    require_harness()
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _yaml_of(name)
    if path is None:
        raise TransActError(
            f"The harness (lm_eval {harness_version()}) has no single task named {name!r}; its "
            "groups are not run, so name one of their tasks."
        )
    with _without_rouge():
        config = load_yaml(path)
    kind = config.get("output_type", "generate_until")
    if kind not in SCORED or config.get("unsafe_code"):
        raise TransActError(
            f"The task {name} has the model write its answer ({kind}); only tasks whose answers "
            "are given and scored can be run here."
        )
    return config


@contextmanager
def _without_rouge() -> Iterator[None]:
    """Lets the functions of TruthfulQA be imported, which stand in one module.

    It imports rouge_score for answers that a model writes; those that are given need none of it.
    """
    name = "rouge_score"
    absent = name not in sys.modules and find_spec(name) is None
    if absent:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].rouge_scorer = sys.modules[name].scoring = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


def _yaml_of(name: str) -> Path | None:
    """The file of a task: the one that says `task: NAME`."""
    wanted = re.compile(rb"^task: *[\"']?" + re.escape(name.encode()) + rb"[\"']? *\r?$", re.M)
    files = _yaml_files()
    # Most files have the name of their task; reading all of them takes a second.
    likely = files.get(name, []) + files.get(name.removeprefix("blimp_"), [])
    others = (path for paths in files.values() for path in paths)
    return next((path for path in chain(likely, others) if wanted.search(path.read_bytes())), None)


@cache
def _yaml_files() -> dict[str, list[Path]]:
    """All of the harness' YAML files, by their names without the suffix."""
    files: dict[str, list[Path]] = {}
    for path in sorted((Path(find_spec(PACKAGE).origin).parent / "tasks").rglob("*.yaml")):
        files.setdefault(path.stem, []).append(path)
    return files


def config_sha256(config: Config) -> str:
    """SHA-256 of a configuration without its data."""

    def plain(value: object) -> object:
        code = getattr(value, "__code__", None)
        return f"{value.__qualname__} {code.co_code.hex()}" if code else str(value)

    text = json.dumps(config, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


# --- tasks -----------------------------------------------------------------------------------


def make_task(
    name: str,
    config: Config,
    rows: Rows,
    numbers: Sequence[int],
    shots: int,
    examples: Rows = (),
    seed: int = 0,
    identity: Mapping[str, object] = MappingProxyType({}),
    progress: Progress = silent,
) -> HarnessTask:
    """A task whose questions are `rows[number]` for each of `numbers`, their prompts made.

    `examples` are the rows that few-shot examples are drawn from, with `seed`. `identity` says what
    configuration and rows were made of.

    Raises:
        TransActError: a row lacks a column of the task, or an example is missing.
    """
    require_harness()
    from lm_eval.api.task import ConfigurableTask

    config = deepcopy(config)
    chosen = [rows[number] for number in numbers]
    try:
        splits = {"questions": as_dataset(chosen)}
        config |= {
            "task": name,
            "custom_dataset": lambda **_: splits,
            "training_split": None,
            "validation_split": None,
            "test_split": "questions",
            "num_fewshot": shots,
        }
        # A task's own examples, as written in its configuration, stay; other splits are not there.
        own = (config.get("fewshot_config") or {}).get("samples") is not None
        if shots and not own:
            splits["examples"] = as_dataset(examples)
            config |= {"training_split": "examples", "fewshot_split": "examples"}
        else:
            config.pop("fewshot_split", None)
        if shots and not own and len(examples) < shots:
            raise TransActError(
                f"The task {name} has {len(examples)} examples where {shots} are to be shown."
            )
        config.pop("dataset_kwargs", None)
        task = ConfigurableTask(config=config)
        task.set_fewshot_seed(seed)
        items = tuple(_items(task, name, numbers, shots, progress))
    except (TransActError, *INTERRUPTIONS):
        raise
    except Exception as error:
        raise TransActError(
            f"The data of the task {name} do not have the columns that the stock task reads "
            f"({type(error).__name__}: {first_line(error)}); it has "
            f"{', '.join(map(str, chosen[0])) if chosen else 'no rows'}."
        ) from None
    aggregations = _aggregations(name, config)
    return HarnessTask(
        name=name,
        items=items,
        aggregations=aggregations,
        higher_is_better={
            metric: bool(better)
            for metric, better in task.higher_is_better().items()
            if metric in aggregations
        },
        shots=shots,
        task=task,
        version=str((config.get("metadata") or {}).get("version", "")),
        identity={**identity, "shots": shots, "seed": seed},
    )


def as_dataset(rows: Rows) -> Any:
    """Rows as a `datasets.Dataset` in memory."""
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


def _items(
    task: Any, name: str, numbers: Sequence[int], shots: int, progress: Progress
) -> Iterable[Item]:
    """What the harness' `build_all_requests` makes, which would draw bars of its own."""
    for place, doc in enumerate(task.eval_docs):
        progress("Making the prompts", place, len(numbers))
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        requests = task.construct_requests(
            doc=doc, ctx=context, metadata=(name, place, task.config.repeats)
        )
        requests = requests if isinstance(requests, list) else [requests]
        chosen_from = len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 0
        yield Item(numbers[place], chosen_from, tuple(requests))


def _aggregations(name: str, config: Config) -> dict[str, str]:
    """The metrics of a task that can be aggregated here.

    Raises:
        TransActError: there is none.
    """
    found = {}
    for metric in config.get("metric_list") or []:
        known = DEFAULT_AGGREGATIONS.get(metric["metric"])
        aggregation = metric.get("aggregation", known)
        if aggregation in AGGREGATIONS:
            found[metric["metric"]] = aggregation
    if not found:
        raise TransActError(
            f"The task {name} has no metric that is a mean over its questions or a perplexity; it "
            "cannot be compared here."
        )
    return found


# --- tokens ----------------------------------------------------------------------------------


class Encoder:
    """Token ids of requests, as the harness' `HFLM` makes them for a model.

    The model itself is not needed. `max_length` is the number of tokens that it sees at once.
    """

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        require_harness()
        from lm_eval.models.huggingface import HFLM

        class Recorder(HFLM):
            """Keeps the token ids that would be scored."""

            def _loglikelihood_tokens(self, requests, **_: object) -> list[tuple[float, bool]]:
                self.seen += [
                    Request(tuple(context), tuple(continuation))
                    for _, context, continuation in requests
                ]
                return [(0.0, False)] * len(requests)

        # The harness gives a tokenizer without a padding token one, so it gets a copy of these.
        own = tokenizer if tokenizer.pad_token_id is not None else deepcopy(tokenizer)
        shell = SimpleNamespace(config=config, device="cpu")
        self._recorder = Recorder(shell, tokenizer=own, backend="causal")

    @property
    def max_length(self) -> int:
        return self._recorder.max_length

    def requests(self, item: Item) -> list[Request]:
        """The token ids of a question's requests; a text that is scored whole gives one or more.

        Raises:
            TransActError: the tokenizer fails.
        """
        self._recorder.seen = []
        kind = item.requests[0].request_type
        try:
            getattr(self._recorder, kind)(list(item.requests), disable_tqdm=True)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise TransActError(
                f"The tokenizer cannot split a question ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); its files may be damaged."
            ) from None
        return self._recorder.seen
