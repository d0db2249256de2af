"""Prompt and answer to token ids, with an exact mask: the two are tokenized apart and never searched for.

Labels are the answer's own tokens and -100 elsewhere; no padding happens here, so a missing pad token or one that
equals the EOS token cannot hide an answer's end.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from u2a_fast.data.packing import IGNORE_INDEX
from u2a_fast.data.parsing import Messages, RowProblem, Text

__all__ = ["Encoded", "PromptAnswerEncoder", "Rendered"]

NO_LIMIT = 10**9  # tokenizers without a limit state a huge one

TokenExample = dict[str, list[int]]


class Rendered(NamedTuple):
    """The texts to be tokenized: a prompt and its answers, each to follow the prompt directly."""

    prompt: str
    answers: tuple[str, ...]
    chat: bool


class Encoded(NamedTuple):
    """One token example per answer, and whether the prompt was cut."""

    examples: tuple[TokenExample, ...]
    truncated: bool


class PromptAnswerEncoder:
    """Turns prompts with answers into token examples of at most ``max_length`` tokens.

    Plain text: a space joins prompt and answer if neither has white space there; the EOS token ends the answer, once.
    Messages: the chat template decides; the answer is what the full rendering adds to the rendering of the prompt.
    ``add_bos``: None as the tokenizer does by itself (for messages: as the template does), True and False force it;
    a tokenizer without a BOS token lends its EOS token.
    Too long: the prompt loses tokens on the left (all answers of a row keep the same prompt), the BOS token stays and
    the answer is never cut. ``max_length=None`` takes the tokenizer's own limit.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None = None, add_bos: bool | None = None) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"[data] expected max_length of at least 2 tokens, got {max_length}")
        limit = tokenizer.model_max_length
        self.tokenizer = tokenizer
        self.max_length: int = max_length or (limit if limit < NO_LIMIT else NO_LIMIT)
        self.add_bos = add_bos
        self.own_prefix = _own_prefix(tokenizer)
        self.bos = _bos_ids(tokenizer) if add_bos else []
        self.prepends_space = _prepends_space(tokenizer)

    def render(self, prompt: Text, answers: Sequence[Text]) -> Rendered:
        """Prompt and answers as they will stand before the model. Raises RowProblem if the template refuses them."""
        if isinstance(prompt, str):
            return Rendered(prompt, tuple(self._joined(prompt, str(answer)) for answer in answers), chat=False)
        text = self._template(prompt, add_generation_prompt=True)
        rendered = [self._template([*prompt, *answer], add_generation_prompt=False) for answer in answers]
        if not all(full.startswith(text) and len(full) > len(text) for full in rendered):
            raise RowProblem("chat template: the prompt's rendering is not the beginning of the whole rendering")
        return Rendered(text, tuple(full[len(text) :] for full in rendered), chat=True)

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded | str]:
        """Token examples of each row, or the reason why a row has none. One call tokenizes all texts."""
        texts = list(chain.from_iterable((row.prompt, *row.answers) for row in rows))
        ids = iter(self._ids(texts))
        out: list[Encoded | str] = []
        for row in rows:
            prompt = next(ids)
            answers = [self._ended(next(ids), row.chat) for _ in row.answers]
            out.append(self._fit(prompt, answers, row.chat))
        return out

    def _joined(self, prompt: str, answer: str) -> str:
        if self.prepends_space:
            return answer.removeprefix(" ")
        return answer if prompt[-1].isspace() or answer[0].isspace() else " " + answer

    def _template(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("[data] rows hold messages and the tokenizer has no chat template: set one on it")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RowProblem(f"chat template: {error}") from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _ended(self, answer: list[int], chat: bool) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return answer if chat or eos is None or answer[-1:] == [eos] else [*answer, eos]

    def _prefixed(self, prompt: list[int], chat: bool) -> tuple[list[int], list[int]]:
        """What must stay at the left, and the rest of the prompt; never a second BOS where the text has one."""
        if self.add_bos is False:
            bos = self.tokenizer.bos_token_id
            return [], prompt[1:] if bos is not None and prompt[:1] == [bos] else prompt
        wanted = self.bos if self.add_bos else ([] if chat else self.own_prefix)
        if chat and not wanted and prompt[:1] == [self.tokenizer.bos_token_id]:
            wanted = prompt[:1]
        return wanted, prompt[len(wanted) :] if prompt[: len(wanted)] == wanted else prompt

    def _fit(self, prompt: list[int], answers: list[list[int]], chat: bool) -> Encoded | str:
        prefix, prompt = self._prefixed(prompt, chat)
        if not prefix and not prompt:
            return "the prompt has no tokens"
        longest = max(map(len, answers))
        if min(map(len, answers)) == 0:
            return "the answer has no tokens"
        room = self.max_length - len(prefix) - longest
        if room < (0 if prefix else 1):
            return f"the answer has {longest} tokens and does not fit in max_length {self.max_length} after a prompt"
        kept = prompt[len(prompt) - room :] if room < len(prompt) else prompt
        context = [*prefix, *kept]
        examples = tuple(_example(context, answer) for answer in answers)
        return Encoded(examples, truncated=len(kept) < len(prompt))


def _example(context: list[int], answer: list[int]) -> TokenExample:
    return {"input_ids": [*context, *answer], "labels": [IGNORE_INDEX] * len(context) + answer}


def _own_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text by itself (usually one BOS token, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    starts = range(len(dressed) - len(bare) + 1)
    at = next((i for i in starts if dressed[i : i + len(bare)] == bare), 0)
    return dressed[:at]


def _bos_ids(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ValueError("[data] add_bos=True needs a tokenizer with a BOS or an EOS token, got one with neither")
    return [bos]


def _prepends_space(tokenizer: Any) -> bool:
    """SentencePiece tokenizers that see "a" as " a": the joining space is then theirs to add."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    return bool(first) and first[0].startswith("\u2581")
