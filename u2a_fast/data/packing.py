"""Packing: examples of different lengths lie one after the other, so that cost follows real tokens, not padding."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LONGEST_TOKENS = 16384  # of the longest examples that are kept in sight: the largest default batch
IGNORE_INDEX = -100  # the label that transformers' losses skip

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Packed:
    """B examples as one sequence of N tokens, of which M predict a scored token.

    A causal model predicts token t + 1 from position t, so the last token of an example is never an input here, and
    neither is anything behind its last scored token.
    """

    input_ids: Tensor  # (N) int64
    position_ids: Tensor  # (N) int64, from 0 within each example
    cu_seqlens: Tensor  # (B + 1) int32, example i owns tokens cu_seqlens[i] : cu_seqlens[i + 1]
    lengths: tuple[int, ...]  # (B) tokens an example, on the host
    rows: Tensor  # (M) int64, the positions in 0..N-1 that predict a scored token
    target: Tensor  # (M) int64, the token each of them should predict
    cu_targets: Tensor  # (B + 1) int32, example i owns rows cu_targets[i] : cu_targets[i + 1]
    scored: tuple[int, ...]  # (B) scored tokens an example, on the host
    longest: int  # one more than the largest position, on the host
    parent: Tensor | None = None  # where prompts are shared, (segments) int32 of ``ops.attention``: data.sharing

    def to(self, device: torch.device) -> "Packed":
        def move(x: Tensor) -> Tensor:
            # From pinned memory the copy waits for nothing, so that a GPU still works on the batch before.
            return (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)

        moved = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Packed(**{**vars(self), **moved})


def _as_ids(value: Any, what: str, i: int) -> Tensor:
    ids = torch.as_tensor(value)
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"[examples] expected {what} of example {i} to be a flat sequence of ints, got {value!r:.80}")
    return ids.to("cpu", torch.int64)


def check_keys(i: int, example: Example) -> None:
    """Raise ValueError where example ``i`` lacks ids or labels."""
    if missing := [key for key in ("input_ids", "labels") if key not in example]:
        raise ValueError(f"[examples] expected keys input_ids and labels, example {i} lacks {missing}")


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Packed:
    """Lay examples out one after the other.

    Args:
        examples: mappings with ``input_ids`` and ``labels`` of equal length; ``labels[t]`` is the token that position
            t - 1 must predict, or -100 where nothing is scored (labels[0] is never scored: nothing precedes it).
        device: where the tensors go.

    Raises:
        ValueError: an example is malformed or has no scored token.
    """
    ids, positions, rows, targets, lengths, scored, start = [], [], [], [], [], [], 0
    for i, example in enumerate(examples):
        check_keys(i, example)
        x, y = _as_ids(example["input_ids"], "input_ids", i), _as_ids(example["labels"], "labels", i)
        if x.shape != y.shape:
            raise ValueError(
                f"[examples] expected labels of example {i} to have the length of input_ids, {len(x)}, got {len(y)}"
            )
        where = (y[1:] != IGNORE_INDEX).nonzero()[:, 0]
        if not len(where):
            raise ValueError(f"[examples] example {i} has no scored token: every label after the first is -100")
        n = int(where[-1]) + 1
        ids.append(x[:n])
        positions.append(torch.arange(n))
        rows.append(where + start)
        targets.append(y[1:][where])
        lengths.append(n)
        scored.append(len(where))
        start += n
    empty = torch.empty(0, dtype=torch.int64)
    packed = Packed(
        input_ids=torch.cat(ids) if ids else empty,
        position_ids=torch.cat(positions) if ids else empty,
        cu_seqlens=offsets(lengths),
        lengths=tuple(lengths),
        rows=torch.cat(rows) if ids else empty,
        target=torch.cat(targets) if ids else empty,
        cu_targets=offsets(scored),
        scored=tuple(scored),
        longest=max(lengths, default=0),
    )
    return packed.to(torch.device(device))


def offsets(counts: list[int]) -> Tensor:
    """Where each run of ``counts`` entries starts, and where the last one ends: (len(counts) + 1) int32."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split examples into batches of at most ``token_budget`` tokens; an example longer than that goes alone.

    Examples of similar length share a batch (the attention pads to the longest), longest first, so that a run that
    cannot fit in memory fails at once. The plan is a pure function of its arguments.

    Returns:
        Lists of positions in ``lengths``, each position in exactly one of them.
    """
    if token_budget < 1:
        raise ValueError(f"[plan_batches] expected token_budget >= 1, got {token_budget}")
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[i] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def batched(examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]:
    """``plan_batches`` over the examples' own lengths: (positions, examples) of every batch."""
    for i, example in enumerate(examples):
        check_keys(i, example)
    plan = plan_batches([len(example["input_ids"]) for example in examples], token_budget)
    return [(batch, [examples[i] for i in batch]) for batch in plan]


def longest_examples(examples: Iterable[Example], tokens: int = LONGEST_TOKENS) -> list[Example]:
    """The longest examples, as many as ``tokens`` tokens take, in a single pass that holds no others."""
    kept: list[tuple[int, int, Example]] = []
    total = 0
    for i, example in enumerate(examples):
        length = len(example.get("input_ids", ()))
        heapq.heappush(kept, (length, -i, example))
        total += length
        while total - kept[0][0] >= tokens:
            total -= heapq.heappop(kept)[0]
    return [example for *_, example in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
