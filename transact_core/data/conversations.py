"""Rows of chat and instruction data sets: turns of a conversation, as text for one model.

What a turn looks like to a model is decided by its chat template, so a row is kept as turns until
the tokenizer is known.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import INTERRUPTIONS, TransActError, first_line

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a list of turns, in the order in which they are looked for."""
PROMPT_AND_ANSWER_COLUMNS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Pairs of columns that together hold one question of the user and one answer."""
INPUT_COLUMN = "input"
"""In Alpaca's format, what an instruction is about; it follows the instruction in the same turn."""
STANDARD_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles, and those that chat templates know."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that chat templates write into a system message: Llama 3's own default. With today's
date, the same file would be another text tomorrow."""
DATE_DIRECTIVES = ("a", "A", "b", "B", "d", "-d", "m", "-m", "y", "Y", "H", "I", "M", "S", "p", "j")
"""The directives of `strftime` that templates may ask for."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def find_conversation_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that make a conversation of a row; none where there are no such columns."""
    names = set(names)
    for name in MESSAGE_COLUMNS:
        if name in names:
            return (name,)
    for pair in PROMPT_AND_ANSWER_COLUMNS:
        if names.issuperset(pair):
            has_input = pair[0] == "instruction" and INPUT_COLUMN in names
            return (*pair, INPUT_COLUMN) if has_input else pair
    return ()


def conversation_from_columns(values: Sequence[object], where: str) -> Conversation | None:
    """The conversation in the values of a pair of columns, or None where one of them is missing.

    `values` are those of the columns that `find_conversation_columns` names: the user's part, the
    answer, and the input of an instruction, if there is one.

    Raises:
        TransActError: a value is neither text nor a list of turns.
    """
    prompt, answer, *rest = values
    if prompt is None or answer is None:
        return None
    if rest and isinstance(prompt, str) and isinstance(rest[0], str) and rest[0].strip():
        prompt = f"{prompt}\n\n{rest[0]}"
    return (*_turns(prompt, "user", where), *_turns(answer, "assistant", where))


def conversation_from_messages(messages: Sequence[object], where: str) -> Conversation:
    """A list of turns, each with `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        TransActError: a turn holds anything but a role and text, such as an image or a tool call.
    """
    turns = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise TransActError(f"{where} holds {type(message).__name__} where a turn is expected.")
        role = message.get("role") or message.get("from")
        content = message.get("content")
        content = _text_of(message.get("value") if content is None else content)
        if not isinstance(role, str) or content is None:
            raise TransActError(
                f"{where} holds a turn (number {position}) without a role and text, as tool calls "
                "and images have none; take the conversation out, or name a column of plain text."
            )
        turns.append(Message(STANDARD_ROLES.get(role, role), content))
    return tuple(turns)


def as_plain_text(conversation: Conversation) -> str:
    """The conversation without a template: every turn as `role: content`."""
    return "\n".join(f"{message.role}: {message.content}" for message in conversation)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def apply_chat_template(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    max_characters: int,
) -> str:
    """The conversations one after the other, as the model's chat template writes them.

    No more are written once the text has `max_characters`.

    Raises:
        TransActError: the template is faulty or refuses a conversation.
    """
    pieces, length = [], 0
    for position, conversation in enumerate(conversations, start=1):
        try:
            piece = tokenizer.apply_chat_template(
                [message._asdict() for message in conversation],
                chat_template=_with_fixed_date(tokenizer.get_chat_template()),
                tokenize=False,
            )
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise TransActError(
                f"The model's chat template fails on conversation {position} of {source} "
                f"({first_line(error)}); take the conversation out, or name a column of plain text "
                "as FILE:COLUMN."
            ) from None
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            break
    return "".join(pieces)


def _with_fixed_date(template: str) -> str:
    """The template with `TEMPLATE_DATE` in place of today.

    transformers gives templates a function `strftime_now`, and passes no other function to them, so
    a macro of that name is put before the template. The empty expression behind it keeps Jinja from
    dropping a newline at the template's beginning.
    """
    if "strftime_now" not in template:
        return template
    dated = "format" + "".join(
        f"|replace('%{directive}', '{TEMPLATE_DATE.strftime('%' + directive)}')"
        for directive in DATE_DIRECTIVES
    )
    macro = "{% macro strftime_now(format) %}{{ " + dated + " }}{% endmacro %}{{ '' }}"
    return macro + template


def _turns(value: object, role: str, where: str) -> Conversation:
    """The turns in one cell: text is one turn of that role."""
    if isinstance(value, str):
        return (Message(role, value),)
    if isinstance(value, list):
        return conversation_from_messages(value, where)
    raise TransActError(f"{where} holds {type(value).__name__} where text is expected.")


def _text_of(content: object) -> str | None:
    """The text of a turn: a string, or a list of parts that are all text; None for others."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None
