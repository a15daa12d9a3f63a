"""Text that a model writes itself, to calibrate, train or measure on.

A repair that is fitted on one kind of text spoils others; what the model says of its own accord is
nearer to all that it was trained on. Two kinds of documents are sampled, at temperature 1 from the
whole distribution:

    plain   from one random token on, as in Liu et al. 2023 (LLM-QAT, arXiv 2305.17888)
    chat    the answer to one of our short prompts, through the model's chat template

Documents are sampled in batches, and each ends where the model ends it, or at its greatest length.
The text is kept in the cache folder: where the machine or its software differs, the last bits of
the logits do, and with them the text.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transact_core.base.cache import digest, mark_used
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import cache_folder, read_text, staged_file
from transact_core.data.conversations import has_chat_template
from transact_core.data.corpus import Corpus, GeneratedText, corpus_from_text, mix
from transact_core.forward.generation import encode_prompt, end_tokens
from transact_core.models.devices import dtype_name
from transact_core.models.load import LoadedModel

DOCUMENT_TOKENS = 512
"""The greatest length of a document."""
AT_ONCE = 16
"""Documents sampled together on a CPU: reading the weights costs the same for all of them."""
AT_ONCE_ON_DEVICE = 128
MOST_EMPTY = 8
"""Batches in a row without text after which a model is taken to write none."""
PROMPTS = (
    "Explain how a bicycle stays upright.",
    "Write a short letter to a neighbour about noise.",
    "What happened in the year 1848?",
    "Give me a recipe with lentils.",
    "Summarise the plot of a story about a lighthouse.",
    "How do I sort a list in Python?",
    "Describe the water cycle for a child.",
    "What is the difference between weather and climate?",
    "Translate 'Good morning, how are you?' into French.",
    "List five facts about the moon.",
    "Write a poem about autumn rain.",
    "Why is the sky blue?",
    "How does a bill become a law?",
    "Give advice to someone who starts a new job.",
    "What is 17 times 24? Show the steps.",
    "Tell me about a famous painter.",
    "Write a dialogue between a customer and a baker.",
    "What are the symptoms of a cold?",
    "Compare trains and planes for a trip of 800 km.",
    "Explain the rules of chess briefly.",
    "Write a function that checks whether a word is a palindrome.",
    "How do plants make food from light?",
    "Draft an email that asks for a refund.",
    "Who wrote the play Hamlet, and what is it about?",
    "Suggest three names for a small café.",
    "What does inflation mean?",
    "Describe a city at night.",
    "How can I sleep better?",
    "Explain the Pythagorean theorem with an example.",
    "Write the beginning of a detective story.",
    "What should I pack for a hike in the mountains?",
    "Rewrite this more politely: send me the file now.",
    "How is glass made?",
    "Name some animals that live in the desert.",
    "What was the Silk Road?",
    "Give me a plan for learning to swim.",
    "Explain what a database index is.",
    "Write a product description for a wooden chair.",
    "What is photosynthesis good for besides plants?",
    "Tell a joke about a librarian.",
)
"""Of many kinds and short, so that what follows is the model's own."""


def written(corpus: Corpus, loaded: LoadedModel, progress: Progress = silent) -> Corpus:
    """The corpus with what a model has to write in it; one that is read already is given back.

    Raises:
        TransActError: the model writes nothing, or has no chat template where the kind is `chat`.
    """
    if corpus.parts:
        parts = [written(part, loaded, progress) for part in corpus.parts]
        changed = any(new is not old for new, old in zip(parts, corpus.parts, strict=True))
        return mix(parts) if changed else corpus
    if corpus.to_write is None:
        return corpus
    wanted = corpus.to_write
    chat = _asks(wanted, loaded.tokenizer)
    path = generated_path(wanted, loaded)
    text = _kept(path)
    if text is None:
        text = "".join(_documents(wanted, chat, loaded, progress))
        _keep(path, text)
    made = corpus_from_text(corpus.source, text)
    notice = f"The text {corpus.source} was written by {loaded.name}; it is in {path}."
    return replace(made, has_special_tokens=chat, notices=(*made.notices, notice))


def written_texts(
    texts: Sequence[Corpus], loaded: LoadedModel, progress: Progress = silent
) -> tuple[Corpus, ...]:
    """As `written`, of several; one that occurs twice is the same object twice."""
    made = {id(text): written(text, loaded, progress) for text in texts}
    return tuple(made[id(text)] for text in texts)


def generated_path(wanted: GeneratedText, loaded: LoadedModel) -> Path:
    """Where a text of this model is kept; it may not be there yet."""
    key = {
        "generated": wanted.source,
        "prompts": PROMPTS,
        "lengths": [DOCUMENT_TOKENS, _at_once(loaded)],
        "weights": sorted(loaded.weight_files.values()),
        "device": loaded.hardware,
        "dtype": dtype_name(loaded.dtype),
    }
    return cache_folder() / "generated" / f"{digest(key)}.txt"


def _at_once(loaded: LoadedModel) -> int:
    return AT_ONCE if loaded.device.type == "cpu" else AT_ONCE_ON_DEVICE


def _asks(wanted: GeneratedText, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there are documents in the chat template.

    Raises:
        TransActError: they are asked for and there is no template.
    """
    if wanted.kind == "chat" and not has_chat_template(tokenizer):
        raise TransActError(
            f"The text {wanted.source} is to be written through the model's chat template, and the "
            "model has none; choose the kind plain."
        )
    return wanted.kind != "plain" and has_chat_template(tokenizer)


def _documents(
    wanted: GeneratedText, chat: bool, loaded: LoadedModel, progress: Progress
) -> Iterator[str]:
    """Documents until they have the tokens that were asked for; plain and chat by turns.

    `chat` is what `_asks` says.
    """
    tokenizer = loaded.tokenizer
    kinds = [*(["plain"] if wanted.kind != "chat" else []), *(["chat"] if chat else [])]
    draw = torch.Generator().manual_seed(wanted.seed)
    done = batch = empty = 0
    while done < wanted.tokens:
        progress("Writing the text", min(done, wanted.tokens), wanted.tokens)
        kind = kinds[batch % len(kinds)]
        begins = _beginnings(kind, loaded, draw)

        def report(new_tokens: int, done: int = done) -> None:
            now = min(done + new_tokens * _at_once(loaded), wanted.tokens)
            progress("Writing the text", now, wanted.tokens)

        before = done
        for ids in _sampled(loaded, begins, int(torch.randint(2**31, (), generator=draw)), report):
            text = tokenizer.decode(
                ids, skip_special_tokens=kind == "plain", clean_up_tokenization_spaces=False
            )
            if text.strip() and done < wanted.tokens:
                done += len(ids)
                yield f"{text}\n" if kind == "chat" else f"{text}\n\n"
        batch += 1
        empty = empty + 1 if done == before else 0
        if empty == MOST_EMPTY:
            raise TransActError(
                f"{loaded.name} ends every text at once, so that it cannot write {wanted.source}; "
                "name a file."
            )
    progress("Writing the text", wanted.tokens, wanted.tokens)


def _beginnings(kind: str, loaded: LoadedModel, draw: torch.Generator) -> list[list[int]]:
    """What a batch of documents begins with, as token ids."""
    tokenizer, vocab_size = loaded.tokenizer, loaded.architecture.vocab_size
    if kind == "chat":
        places = torch.randint(len(PROMPTS), (_at_once(loaded),), generator=draw).tolist()
        return [encode_prompt(tokenizer, PROMPTS[place], True, vocab_size) for place in places]
    special = set(tokenizer.all_special_ids)
    usable = [token for token in range(min(vocab_size, len(tokenizer))) if token not in special]
    places = torch.randint(len(usable), (_at_once(loaded),), generator=draw).tolist()
    # What the tokenizer puts before every text, such as a beginning-of-sequence token.
    before = list(tokenizer("", verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    before = [token for token in before if token != end or end == tokenizer.bos_token_id]
    return [[*before, usable[place]] for place in places]


class _Told(StoppingCriteria):
    """Stops nothing; tells after each token how many there are."""

    def __init__(self, report, prompt_tokens: int) -> None:
        self._report, self._prompt_tokens = report, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self._report(input_ids.shape[1] - self._prompt_tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _sampled(loaded: LoadedModel, begins: list[list[int]], seed: int, report) -> list[list[int]]:
    """Each beginning with its continuation, up to the first end-of-sequence token."""
    loaded.require_whole("Writing a text")
    model: PreTrainedModel = loaded.model
    ends = end_tokens(model)
    padding = next(iter(sorted(ends)), 0)
    longest = max(map(len, begins))
    room = loaded.model.config.max_position_embeddings - longest
    # Padded on the left, where the mask hides it.
    rows = [[padding] * (longest - len(ids)) + ids for ids in begins]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in begins]
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, min(DOCUMENT_TOKENS - longest, room)),
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
    )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        made = model.generate(
            torch.tensor(rows, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Told(report, longest)]),
        ).tolist()
    documents = []
    for ids, begin in zip(made, begins, strict=True):
        ids = ids[longest - len(begin) :]
        stop = next(
            (place for place in range(len(begin), len(ids)) if ids[place] in ends), len(ids) - 1
        )
        documents.append(ids[: stop + 1])
    return documents


def _kept(path: Path) -> str | None:
    """A text that was written before."""
    with suppress(OSError, UnicodeDecodeError):
        text = read_text(path)
        mark_used(path)
        return text
    return None


def _keep(path: Path, text: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            staging.write_text(text, encoding="utf-8")
