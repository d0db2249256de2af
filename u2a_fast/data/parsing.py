"""From the columns of one row to prompt and answers, checked; every fault has a plain reason."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from u2a_fast.data.columns import Kind, Layout

__all__ = ["Messages", "ParsedRow", "RowProblem", "Text", "parse_row", "plain_text"]

Messages = list[dict[str, Any]]
Text = str | Messages


class RowProblem(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class ParsedRow:
    """A usable row: prompt and answers are all plain text, or all lists of messages."""

    id: str | None
    prompt: Text
    answers: tuple[Text, ...]
    reward: float | None


def parse_row(kind: Kind, layout: Layout, columns: Mapping[str, Any]) -> ParsedRow:
    """The fields of a row. Raises RowProblem with the first fault found."""
    answers = tuple(_text(columns, layout.columns[field]) for field in kind.answers)
    if "prompt" in layout.columns:
        prompt = _text(columns, layout.columns["prompt"])
    else:
        prompt, answers = _split_conversations(answers)
    prompt, answers = _same_form(prompt, answers)
    if kind.name == "preferences" and answers[0] == answers[1]:
        raise RowProblem("chosen and rejected are the same: the pair prefers nothing")
    reward = _reward(columns, layout.columns["reward"]) if kind.reward else None
    identifier = _identifier(columns, layout.columns["id"]) if "id" in layout.columns else None
    return ParsedRow(identifier, prompt, answers, reward)


def plain_text(text: Text) -> str:
    """The words of a text or of messages, to be read by a person."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _text(columns: Mapping[str, Any], column: str) -> Text:
    if column not in columns:
        raise RowProblem(f"missing column {column!r}")
    value = columns[column]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return _messages(value, column)
    _check_string(value, column)
    return value


def _check_string(value: Any, what: str) -> None:
    if value is None:
        raise RowProblem(f"{what} is null")
    if not isinstance(value, str):
        raise RowProblem(f"expected {what} to be a string or a list of messages, got {type(value).__name__}")
    if not value.strip():
        raise RowProblem(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(f"{what} holds a lone surrogate, which is no text") from None


def _messages(value: Sequence[Any], column: str) -> Messages:
    if not value:
        raise RowProblem(f"{column} is empty")
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowProblem(f"expected {column}[{position}] to be a message with role and content")
        _check_string(message.get("content"), f"{column}[{position}].content")
        # Parquet gives every message every key that any message has.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def _split_conversations(answers: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    """The prompt inside whole conversations: what they share, or for a single one all but its last message."""
    conversations = [answer for answer in answers if not isinstance(answer, str)]
    if len(conversations) != len(answers):
        raise RowProblem("an implicit prompt needs lists of messages, got a string (give a prompt column)")
    shared = len(conversations[0]) - 1 if len(conversations) == 1 else _shared_prefix(*conversations)
    if shared == 0 or any(len(c) == shared for c in conversations):
        raise RowProblem("the conversation holds no prompt before the answer, or no answer after the prompt")
    if any(c[shared]["role"] != "assistant" for c in conversations):
        raise RowProblem(f"expected message {shared} of the conversation to be the assistant's")
    return conversations[0][:shared], tuple(c[shared:] for c in conversations)


def _shared_prefix(first: Messages, second: Messages) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _same_form(prompt: Text, answers: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    if isinstance(prompt, str):
        if not all(isinstance(answer, str) for answer in answers):
            raise RowProblem("the prompt is a string and an answer is a list of messages: expected one form")
        return prompt, answers
    wrapped = ([{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers)
    return prompt, tuple(wrapped)


def _reward(columns: Mapping[str, Any], column: str) -> float:
    value = columns.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowProblem(f"expected {column} to be a number, got {'null' if value is None else type(value).__name__}")
    if not math.isfinite(value):
        raise RowProblem(f"expected {column} to be finite, got {value}")
    return float(value)


def _identifier(columns: Mapping[str, Any], column: str) -> str:
    value = columns.get(column)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowProblem(f"expected {column} to be a string or an integer, got {value!r}")
    if isinstance(value, str):
        _check_string(value, column)
    return str(value)
