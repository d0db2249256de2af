"""The rows of the case table for ops on packed gradients of linear layers: their inputs, error scales and cost."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .testing import Case

__all__ = ["PREFIXES", "cost", "inputs", "rows", "scales", "timing_rows"]

Row = tuple[str, dict[str, int], dict[str, Any]]

# How the names of these ops start.
PREFIXES = ("ghost", "grad")

# What an op takes beside a, g and cu_seqlens, and its shape letters.
_OPERANDS: dict[str, dict[str, str]] = {
    "ghost_dot": {"v": "KOI"},
    "ghost_dot_lowrank": {"left": "KOR", "right": "KIR"},
    "grad_project": {"p_in": "IP", "p_out": "OQ"},
}


def _sizes(i: int, o: int, lengths: tuple[int, ...]) -> dict[str, int]:
    return {"N": sum(lengths), "B": len(lengths), "I": i, "O": o}


def _whole_rows() -> Iterator[Row]:
    # I, O, K, tokens of each example: registers' widths and one off them, empty and one-token examples, nothing at all.
    table: list[tuple[int, int, int, tuple[int, ...]]] = [
        (3, 5, 1, (2, 0, 4)),
        (16, 16, 1, (16, 16)),
        (64, 48, 1, (1, 31, 0, 0, 32)),
        (33, 65, 3, (1, 1, 1, 17, 0)),
        (257, 31, 2, (40, 3)),
        (40, 200, 1, (129,)),
        (7, 9, 0, (3, 2)),
        (7, 9, 2, ()),
        (7, 9, 2, (0, 0, 0)),
        (1, 1, 1, (1,)),
        (130, 520, 1, (5, 70, 1)),
    ]
    for i, o, k, lengths in table:
        sizes = _sizes(i, o, lengths)
        yield "ghost_dot", {**sizes, "K": k}, {"lengths": lengths}
        if k == 1 or not lengths:
            yield "ghost_norm", sizes, {"lengths": lengths}
    # Several directions over examples from one token on: short ones take the row form, long ones the tile form, in one
    # call, with more directions than registers and examples than are contracted together.
    mixed = (1, 2, 17, 0, 40, 128, 3, 33, 64)
    several: list[tuple[int, int, int, tuple[int, ...]]] = [
        (16, 24, 2, (1, 2, 17, 60)),
        (37, 70, 5, mixed),
        (96, 130, 16, (128, 128)),
        (30, 9, 35, mixed),
    ]
    for i, o, k, lengths in several:
        yield "ghost_dot", {**_sizes(i, o, lengths), "K": k}, {"lengths": lengths}
    # Long examples over narrow layers take the tile form of the norm.
    for i, o, lengths in ((6, 10, (90, 1, 40)), (35, 19, (140, 10))):
        yield "ghost_norm", _sizes(i, o, lengths), {"lengths": lengths}


def _factor_rows() -> Iterator[Row]:
    # I, O, K, R, P, Q, tokens of each example: one column, a vector of them, one more, several tiles, none at all.
    table: list[tuple[int, int, int, int, int, int, tuple[int, ...]]] = [
        (3, 5, 1, 1, 1, 1, (2, 0, 4)),
        (64, 48, 1, 16, 16, 16, (1, 31, 0, 0, 32)),
        (33, 65, 3, 17, 5, 17, (1, 1, 1, 17, 0)),
        (40, 90, 2, 64, 64, 13, (129,)),
        (130, 70, 20, 33, 40, 70, (5, 100, 1)),
        (300, 540, 1, 40, 8, 33, (64,)),
        (7, 9, 0, 2, 0, 3, (3, 2)),
        (7, 9, 2, 0, 3, 0, (3, 2)),
        (0, 9, 2, 3, 3, 2, (3, 2)),
        (7, 9, 2, 3, 2, 2, ()),
        (7, 9, 2, 3, 2, 2, (0, 0, 0)),
    ]
    for i, o, k, r, p, q, lengths in table:
        sizes = _sizes(i, o, lengths)
        yield "ghost_dot_lowrank", {**sizes, "K": k, "R": r}, {"lengths": lengths}
        yield "grad_project", {**sizes, "P": p, "Q": q}, {"lengths": lengths}


def rows() -> Iterator[Row]:
    """Parity rows of every op."""
    yield from _whole_rows()
    yield from _factor_rows()


def timing_rows() -> Iterator[Row]:
    """Timing rows: layers of small models, and the ranks and projections that low-rank scoring and indices use."""
    short, batch = (128,) * 16, (128,) * 32
    for i, o in ((256, 256), (256, 704), (704, 256), (384, 1024), (1024, 1024)):
        yield "ghost_dot", {**_sizes(i, o, short), "K": 1}, {"lengths": short}
        yield "ghost_norm", _sizes(i, o, short), {"lengths": short}
    for i, o in ((256, 704), (1024, 1024)):
        yield "ghost_dot", {**_sizes(i, o, short), "K": 16}, {"lengths": short}
    for i, o in ((1024, 1024), (1024, 4096)):
        for r in (16, 64):
            yield "ghost_dot_lowrank", {**_sizes(i, o, batch), "K": 1, "R": r}, {"lengths": batch}
            yield "grad_project", {**_sizes(i, o, batch), "P": r, "Q": r}, {"lengths": batch}


def _shapes(case: "Case") -> dict[str, tuple[int, ...]]:
    letters = {"a": "NI", "g": "NO", **_OPERANDS.get(case.op, {})}
    return {name: tuple(case.sizes[c] for c in axes) for name, axes in letters.items()}


def inputs(case: "Case", normal: Callable[..., Tensor]) -> dict[str, Any]:
    """Arguments of ``case``; ``normal(*shape)`` draws from a standard normal distribution in the case's dtype."""
    shapes = _shapes(case)
    arguments = {name: normal(*shapes.pop(name)) for name in ("a", "g")}
    cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    return {**arguments, "cu_seqlens": cu_seqlens, **{name: normal(*shape) for name, shape in shapes.items()}}


def scales(case: "Case", wide: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op with every term replaced by its magnitude."""
    magnitudes = {name: x.abs() if x.is_floating_point() else x for name, x in wide.items()}
    return (getattr(reference, case.op)(**magnitudes),)


def cost(case: "Case") -> tuple[int, int]:
    """Floating-point operations of the algorithm and the fewest bytes it can move."""
    s = case.sizes
    n, b, i, o = (s[c] for c in "NBIO")
    if case.op == "ghost_dot":
        # Every direction meets every token, or every example's gradient once this is made.
        flops, results = 2 * min(s["K"] * n, n + s["K"] * b) * i * o, s["K"] * b
    elif case.op == "ghost_dot_lowrank":
        flops, results = 2 * s["K"] * n * s["R"] * (i + o), s["K"] * b
    elif case.op == "ghost_norm":
        flops, results = sum(min(t * t * (i + o), 2 * t * i * o) for t in case.lengths), b
    else:
        flops, results = 2 * n * (i * s["P"] + o * s["Q"] + s["P"] * s["Q"]), b * s["P"] * s["Q"]
    element = torch.finfo(case.dtype).bits // 8
    return flops, element * sum(map(math.prod, _shapes(case).values())) + 4 * results
