"""Questions made of a text of the user's own, for tasks that need no data set.

There are two kinds: `continuation` asks which of four continuations is the true one, the others
being taken from elsewhere in the text; `last_word` asks for the last word of a sentence after what
stands before it, as LAMBADA does (Paperno et al. 2016, arXiv 1606.06031). The questions come from
the second half of the text, since calibration and evaluation take its beginning. They depend on the
text and the seed alone.
"""

import random
import re

from transact_core.base.errors import TransActError
from transact_core.data.corpus import Corpus, require_written, texts_of

CONTINUATION, LAST_WORD = "continuation", "last_word"
OWN_TEXT_TASKS = (CONTINUATION, LAST_WORD)
CONTEXT_WORDS = 24
"""Words before a continuation, and before a sentence whose last word is asked for."""
CONTINUATION_WORDS = 6
CHOICES = 4
FEWEST_QUESTIONS = 20
"""A text that gives fewer tells too little."""
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
LAST_WORD_OF_SENTENCE = re.compile(r"(.+\w) ([A-Za-z]{3,})[.!?]")
"""A sentence that ends in a word of three letters or more: what stands before it, and the word."""
FEWEST_WORDS = 6
"""In a sentence whose last word is asked for."""

Row = dict[str, object]


def own_text_rows(kind: str, corpus: Corpus, seed: int) -> list[Row]:
    """All questions of one of `OWN_TEXT_TASKS` that a text gives, in the order of the text.

    White space is made single spaces, so that line ends do not tell which continuation is true.

    Raises:
        TransActError: the text gives fewer than `FEWEST_QUESTIONS`.
    """
    require_written(corpus)
    words = " ".join(text.text for text in texts_of(corpus)).split()
    words = words[len(words) // 2 :]
    rows = _continuations(words, seed) if kind == CONTINUATION else _last_words(words)
    if len(rows) < FEWEST_QUESTIONS:
        raise TransActError(
            f"The second half of the text {corpus.source} gives {len(rows)} questions for the task "
            f"{kind}, fewer than {FEWEST_QUESTIONS}; name a longer text."
        )
    return rows


def _continuations(words: list[str], seed: int) -> list[Row]:
    """Rows of `context`, `continuations` and the index of the true one, `answer`."""
    length = CONTEXT_WORDS + CONTINUATION_WORDS
    starts = range(0, len(words) - length + 1, length)
    contexts = [" ".join(words[start : start + CONTEXT_WORDS]) for start in starts]
    true = [" ".join(words[start + CONTEXT_WORDS : start + length]) for start in starts]
    different = sorted(set(true))
    if len(different) < CHOICES:
        return []
    rows: list[Row] = []
    for place, (context, continuation) in enumerate(zip(contexts, true, strict=True)):
        # A generator for each, so that a question does not depend on those before it.
        generator = random.Random(f"{seed} {place}")
        drawn = generator.sample(different, CHOICES)
        continuations = [text for text in drawn if text != continuation][: CHOICES - 1]
        answer = generator.randrange(CHOICES)
        continuations.insert(answer, continuation)
        rows.append({"context": context, "continuations": continuations, "answer": answer})
    return rows


def _last_words(words: list[str]) -> list[Row]:
    """Rows of `context` and its next word, `word`."""
    rows: list[Row] = []
    before: list[str] = []
    for sentence in SENTENCE_END.split(" ".join(words)):
        found = LAST_WORD_OF_SENTENCE.fullmatch(sentence)
        if found and len(before) >= CONTEXT_WORDS and sentence.count(" ") + 1 >= FEWEST_WORDS:
            context = " ".join([*before[-CONTEXT_WORDS:], found.group(1)])
            rows.append({"context": context, "word": found.group(2)})
        before += sentence.split(" ")
    return rows
