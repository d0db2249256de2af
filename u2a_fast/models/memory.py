"""Batches that fit in memory: how many tokens one may have is found by trying, and none that is too large ends a run.

What a loop over batches gives is a function of its data and of the budget that it ends with: a batch that does not fit
throws away what the loop has made and starts it over at half the budget. Batches come largest first, so the first one
is the trial and little is lost; and nothing that is summed over batches is counted twice.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from u2a_fast.data.packing import Example

__all__ = ["OutOfRoom", "Room", "TokenBudget", "describe", "is_out_of_memory"]

T = TypeVar("T")

# PyTorch has an error class for GPUs only; the others speak through the text of a RuntimeError. The stable ABI, by
# which our C++ ops allocate (csrc/torch_tensors.h), keeps of an error no more than which call failed.
_TEXTS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "no memory for the result of a u2a_fast kernel",
    'torch_call_dispatcher( "aten::contiguous"',
)
_NAMED = 5  # examples that a warning names


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in _TEXTS)


class OutOfRoom(RuntimeError):
    """A batch of several examples, ``tokens`` in all, does not fit: the loop is to start over with less."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"[token_budget] a batch of {tokens} tokens does not fit in memory")
        self.tokens = tokens


class Room:
    """One attempt at a loop over batches.

    Attributes:
        tokens: most tokens a batch.
        unfit: what is to be said of the examples that do not fit in memory even alone.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.unfit: list[str] = []

    def each(
        self, plan: Sequence[tuple[list[int], list[Example]]], step: Callable[[list[int], list[Example]], T]
    ) -> Iterator[tuple[list[int], T | None]]:
        """(positions, ``step`` of both) of every batch; None for an example that does not fit even alone.

        Raises OutOfRoom for a batch of several that does not fit.
        """
        for positions, batch in plan:
            result, fits = None, True
            try:
                result = step(positions, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:  # here, not in the handler: the error would hold the failed batch's tensors
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # blocks of the sizes that failed serve no smaller batch
                if len(batch) > 1:
                    raise OutOfRoom(sum(len(example["input_ids"]) for example in batch))
                self.unfit.append(describe(positions[0], batch[0]))
            yield positions, result


def describe(position: int, example: Example) -> str:
    """An example by its id, else by its position in the call, and its length."""
    name = repr(example["id"]) if "id" in example else str(position)
    return f"example {name}, {len(example['input_ids'])} tokens"


class TokenBudget:
    """Most tokens a batch, for every kind of loop what was found to fit, for as long as this object is kept.

    Args:
        tokens: what every kind of loop starts with.

    Attributes:
        found: tokens by kind of loop, of those that have run.
    """

    def __init__(self, tokens: int) -> None:
        self.start = tokens
        self.found: dict[str, int] = {}
        self._said: set[str] = set()

    @property
    def least(self) -> int:
        """The smallest budget of any kind of loop."""
        return min([self.start, *self.found.values()])

    def apart(self) -> "TokenBudget":
        """A copy that later loops of this one do not see, and that warns of nothing twice."""
        other = TokenBudget(self.start)
        other.found, other._said = dict(self.found), self._said
        return other

    def fit(self, kind: str, attempt: Callable[[Room], T], *, unfit: str = "get NaN") -> T:
        """What ``attempt`` gives with the budget of this kind of loop, halved until every batch fits.

        A smaller budget than asked for is kept and warned of once, and so is every example that does not fit alone;
        ``unfit`` says what such ones do.
        """
        asked = tokens = min(self.found.get(kind, self.start), self.start)
        while True:
            room, cost = Room(tokens), 0
            try:
                made = attempt(room)
            except OutOfRoom as error:
                cost = error.tokens
            if not cost:
                break
            tokens = _halved(tokens, cost)
        self.found[kind] = tokens
        if tokens < asked:
            self._say(
                f"[token_budget] {kind}: batches of {asked} tokens do not fit in memory: going on with {tokens} tokens "
                "a batch"
            )
        self._tell_unfit(kind, room.unfit, unfit)
        return made

    def _tell_unfit(self, kind: str, unfit: Sequence[str], what: str) -> None:
        new = [text for text in unfit if f"{kind}: {text}" not in self._said]
        self._said.update(f"{kind}: {text}" for text in new)
        if new:
            shown = "; ".join(new[:_NAMED]) + ("; ..." if len(new) > _NAMED else "")
            warnings.warn(
                f"[token_budget] {kind}: {len(new)} examples do not fit in memory even alone ({shown}) "
                f"and {what}: a lower max_length or 16 bits may let them fit",
                stacklevel=4,
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=4)


def _halved(tokens: int, cost: int) -> int:
    """The first half of a half ... of ``tokens`` that a batch of ``cost`` tokens does not meet, at least 1."""
    tokens //= 2
    while tokens >= cost:  # the same batch would fail again
        tokens //= 2
    return max(tokens, 1)
