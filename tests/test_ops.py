"""Every op against its float64 reference over the case table, and what the table cannot say: views, bits, errors."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from u2a_fast import _register, ops, reference, testing
from u2a_fast._register import OPS, extension_error, implementations
from u2a_fast.testing import CASES, TIMING_CASES, Case

ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = [case for case in CASES if case.dtype == torch.float32]
FLOAT64 = [case for case in CASES if case.dtype == torch.float64]
ELEMENTWISE = ("glu_jvp", "rms_norm_jvp", "rotary")
LARGEST = {op: max((c for c in FLOAT32 if c.op == op), key=lambda c: testing.cost(c)[0]) for op in OPS}

needs_extension = pytest.mark.skipif(extension_error is not None, reason=f"no C++ kernels: {extension_error}")


def ident(case: Case) -> str:
    return case.id


def call(case: Case, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    out = getattr(ops, case.op)(**arguments)
    return out if isinstance(out, tuple) else (out,)


def assert_same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_every_part(op: str) -> None:
    assert op in ops.__all__ and op in reference.__all__
    assert {case.dtype for case in CASES if case.op == op} == set(testing.DTYPES)
    assert any(case.op == op for case in TIMING_CASES)
    assert op in testing.CONSTANTS
    assert f'm.impl("{op}"' in (ROOT / "csrc" / "torch_ops.cpp").read_text()
    assert f"def {op}(" in (ROOT / "kernels" / f"{op}.py").read_text()


def test_case_names_are_unique() -> None:
    names = [case.id for case in (*CASES, *TIMING_CASES)]
    assert len(names) == len(set(names))


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_extension_serves_the_cpu(op: str) -> None:
    assert "cpu" in implementations(op)


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_parity_with_float64_reference(case: Case) -> None:
    arguments = testing.inputs(case)
    assert testing.violations(case, arguments, call(case, arguments)) == []


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_fallback_meets_the_same_budget(case: Case) -> None:
    arguments = testing.inputs(case)
    assert testing.violations(case, arguments, getattr(reference, case.op)(**arguments)) == []


@pytest.mark.parametrize("op", OPS)
def test_budget_notices_a_wrong_result(op: str) -> None:
    case = LARGEST[op]
    arguments = testing.inputs(case)
    for j in range(len(call(case, arguments))):
        outputs = [x.clone() for x in call(case, arguments)]
        outputs[j].view(-1)[-1] += 1e-3 * outputs[j].abs().max()
        assert testing.violations(case, arguments, tuple(outputs))
        outputs[j].view(-1)[-1] = torch.nan
        assert testing.violations(case, arguments, tuple(outputs))


@pytest.mark.parametrize("case", FLOAT32, ids=ident)
def test_same_bits_twice_and_for_any_number_of_threads(case: Case) -> None:
    arguments = testing.inputs(case)
    with threads(1):
        first, again = call(case, arguments), call(case, arguments)
    with threads(3):
        threaded = call(case, arguments)
    assert_same_bits(first, again)
    assert_same_bits(first, threaded)


PACKED: dict[str, dict[str, int]] = {
    "ghost_dot": {"K": 2},
    "ghost_dot_lowrank": {"K": 2, "R": 5},
    "ghost_norm": {},
    "grad_project": {"P": 37, "Q": 13},
    "grad_sketch": {"M": 100},
}


@needs_extension
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("op", PACKED)
def test_an_example_does_not_see_its_neighbors(op: str, dtype: torch.dtype) -> None:
    lengths = (5, 40, 1, 17, 0, 97)
    case = Case(op, {"N": sum(lengths), "B": len(lengths), "I": 280, "O": 45, **PACKED[op]}, dtype, lengths)
    arguments = testing.inputs(case)
    (together,) = call(case, arguments)
    examples = 1 if "K" in PACKED[op] else 0
    for i, (begin, end) in enumerate(pairwise(arguments["cu_seqlens"].tolist())):
        own = {"a": arguments["a"][begin:end], "g": arguments["g"][begin:end], "cu_seqlens": offsets(0, end - begin)}
        (alone,) = call(case, arguments | own)
        assert torch.equal(alone.select(examples, 0), together.select(examples, i))


@needs_extension
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("k", [15, 16, 21, 50])  # below the least; whole and part vectors
def test_directions_may_lie_side_by_side(k: int, dtype: torch.dtype) -> None:
    lengths = (5, 40, 1, 17, 0, 97, *[3] * 30)  # more examples than are contracted at once
    case = Case("ghost_dot", {"N": sum(lengths), "B": len(lengths), "I": 140, "O": 205, "K": k}, dtype, lengths)
    arguments = testing.inputs(case)
    v = arguments["v"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert v.stride(0) == 1
    beside = arguments | {"v": v}
    for count in (1, 3):
        with threads(count):
            together = ops.ghost_dot(**beside)
            assert testing.violations(case, beside, (together,)) == []
            assert torch.equal(ops.ghost_dot(**beside), together)
    begin, end = sum(lengths[:5]), sum(lengths[:6])
    own = {"a": beside["a"][begin:end], "g": beside["g"][begin:end], "cu_seqlens": offsets(0, end - begin)}
    assert torch.equal(ops.ghost_dot(**beside | own)[:, 0], together[:, 5])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinity_side_by_side_stays_in_its_direction(dtype: torch.dtype) -> None:
    v = torch.ones(16, 70, 70, dtype=dtype)
    v[3, 69, 69] = torch.inf
    a, g = torch.ones(80, 70, dtype=dtype), torch.ones(80, 70, dtype=dtype)
    out = ops.ghost_dot(a, g, offsets(0, 80), v.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert not out[3].isfinite()
    assert (out[torch.arange(16) != 3] == 80 * 70 * 70).all()


@needs_extension
def test_projections_of_many_tokens_have_the_same_bits_for_any_number_of_threads() -> None:
    lengths = (700, 0, 2300)
    case = Case("grad_project", {"N": 3000, "B": 3, "I": 20, "O": 30, "P": 64, "Q": 70}, torch.float32, lengths)
    arguments = testing.inputs(case)
    with threads(1):
        want = call(case, arguments)
    assert testing.violations(case, arguments, want) == []
    for count in (2, 3):
        with threads(count):
            assert_same_bits(call(case, arguments), want)


@needs_extension
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_token_does_not_see_its_neighbors(dtype: torch.dtype) -> None:
    arguments = testing.inputs(Case("linear_logprob", {"N": 45, "D": 33, "V": 301}, dtype, bias=True, softcap=5.0))
    together = ops.linear_logprob(**arguments)
    for row in (0, 13, 44):
        alone = arguments | {"h": arguments["h"][row : row + 1], "target": arguments["target"][row : row + 1]}
        assert_same_bits(ops.linear_logprob(**alone), tuple(x[row : row + 1] for x in together))


def test_many_rows_and_columns_cross_every_block() -> None:
    lengths = (700, 0, 1500)
    ghost = Case("ghost_dot", {"N": 2200, "B": 3, "I": 20, "O": 300, "K": 1}, torch.float32, lengths)
    wide = Case("ghost_dot", {"N": 3, "B": 1, "I": 4100, "O": 600, "K": 1}, torch.float32, (3,))
    tall = Case("linear_logprob_backward", {"N": 2100, "D": 9, "V": 520}, torch.float32, bias=True)
    broad = Case("linear_logprob_jvp", {"N": 4, "D": 2100, "V": 700, "K": 2}, torch.float32, softcap=9.0)
    ranks = Case("ghost_dot_lowrank", {"N": 40, "B": 1, "I": 4100, "O": 20, "K": 2, "R": 100}, torch.float32, (40,))
    banded = Case("grad_sketch", {"N": 3, "B": 2, "I": 4100, "O": 1300, "M": 1000}, torch.float32, (1, 2))
    for case in (ghost, wide, tall, broad, ranks, banded):
        for dtype in testing.DTYPES:
            typed = Case(**{**vars(case), "dtype": dtype})
            arguments = testing.inputs(typed)
            assert testing.violations(typed, arguments, call(typed, arguments)) == []


def in_a_larger_one(x: Tensor, offset: int) -> Tensor:
    """x as a view whose surroundings are NaN (or an id out of range), misaligned by ``offset`` elements."""
    sentinel = torch.nan if x.is_floating_point() else -(2**30)
    room = torch.full((*x.shape[:-1], x.shape[-1] + 7), sentinel, dtype=x.dtype)
    view = room[..., offset : offset + x.shape[-1]]
    return view.copy_(x)


def transposed(x: Tensor, offset: int) -> Tensor:
    """x with its last axis strided."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def test_head_of_extreme_values() -> None:
    """Hidden states whose nearest bfloat16 is infinite, and one that is itself: no other row is touched by it."""
    h = torch.tensor([[3.4e38, 1.0, -3.395e38], [1.0, 2.0, 3.0], [float("inf"), 1.0, 1.0]])
    weight = torch.tensor([[2.0**-120, 3.0, 2.0**-121], [-(2.0**-119), 0.5, 2.0**-122]])
    target = torch.tensor([0, 1, 0])
    got = ops.linear_logprob(h, weight, target)
    want = ops.linear_logprob(h[:2].double(), weight.double(), target[:2])
    for part, exact in zip(got, want, strict=True):
        torch.testing.assert_close(part[:2].double(), exact, rtol=1e-6, atol=1e-6)
        assert not part[2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_words_that_a_bias_forbids_may_fill_a_tile(dtype: torch.dtype) -> None:
    h, weight, bias = torch.randn(4, 32, dtype=dtype), torch.randn(600, 32, dtype=dtype), torch.zeros(600, dtype=dtype)
    bias[:300] = -math.inf
    target = torch.full((4,), 500)
    got = ops.linear_logprob(h, weight, target, bias)[0].double()
    exact = torch.log_softmax(h.double() @ weight.double().T + bias.double(), -1)[:, 500]
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    assert exact.isfinite().all()


def test_a_nan_of_any_bits_is_not_hidden_by_an_exponential() -> None:
    """Payloads whose low bits would reach the exponent."""
    for bits in (0x7FC00001, 0x7FC000FF, 0x7FC00180, 0x7F800101, -1):
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
        q, bias = torch.randn(8, 1, 64), torch.zeros(300)
        q[3], bias[7] = nan, nan
        out = ops.attention(q, torch.randn(8, 1, 64), torch.randn(8, 1, 64), torch.tensor([0, 8], dtype=torch.int32))[0]
        assert out[3].isnan().all() and out[:3].isfinite().all()
        assert ops.linear_logprob(torch.randn(4, 32), torch.randn(300, 32), torch.arange(4), bias)[0].isnan().all()


def test_ghost_dot_of_extreme_values() -> None:
    """The same for an activation: the other example, and the other direction, see nothing of an infinity."""
    a = torch.tensor([[3.4e38, 1.0, -3.395e38], [1.0, 2.0, 3.0], [float("inf"), 1.0, 1.0]])
    v = torch.tensor([[[2.0**-120, 3.0, 2.0**-121]], [[0.0, 0.5, 2.0**-122]]])
    g, cu_seqlens = torch.tensor([[1.0], [-2.0], [4.0]]), torch.tensor([0, 2, 3], dtype=torch.int32)
    for direction in v[:, None]:
        got = ops.ghost_dot(a, g, cu_seqlens, direction)
        want = ops.ghost_dot(a[:2].double(), g[:2].double(), cu_seqlens[:2], direction.double())
        torch.testing.assert_close(got[:, :1].double(), want, rtol=1e-6, atol=1e-6)
        assert not got[:, 1].isfinite()


@pytest.mark.parametrize("view", [in_a_larger_one, transposed])
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("op", OPS)
def test_views_give_the_same_bits(op: str, offset: int, view: Callable[[Tensor, int], Tensor]) -> None:
    for case in CASES:
        if case.op != op or case.dtype not in (torch.float32, torch.bfloat16):
            continue
        arguments = testing.inputs(case)
        views = {k: view(x, offset) if isinstance(x, Tensor) else x for k, x in arguments.items()}
        assert_same_bits(call(case, views), call(case, arguments))
        for name, x in arguments.items():
            assert not isinstance(x, Tensor) or torch.equal(x, views[name]), f"{name} was written to"


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("attention")])
def test_a_nan_is_not_hidden(op: str) -> None:
    case = LARGEST[op]
    arguments = testing.inputs(case)
    first = next(name for name in ("a", "gate", "h", "x") if name in arguments)
    arguments[first][0, 0] = torch.nan
    outputs = call(case, arguments)
    want = getattr(reference, op)(**arguments)
    for got, expected in zip(outputs, want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(got.isnan(), expected.isnan())


@needs_extension
@pytest.mark.parametrize("op", ELEMENTWISE)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_row_does_not_see_its_neighbors(op: str, dtype: torch.dtype) -> None:
    sizes = {"glu_jvp": {"N": 9, "I": 37}, "rms_norm_jvp": {"N": 9, "D": 37}, "rotary": {"N": 9, "H": 3, "E": 22}}
    case = Case(op, sizes[op], dtype)
    arguments = testing.inputs(case)
    together = call(case, arguments)
    part = {k: x[4:7] if floating(x) and x.dim() > 1 else x for k, x in arguments.items()}
    assert_same_bits(call(case, part), tuple(x[4:7] for x in together))
    for name, x in arguments.items():
        if floating(x) and x.dim() > 1:
            spoiled = x.clone()
            spoiled[5].fill_(torch.nan)
            for got, clean in zip(call(case, arguments | {name: spoiled}), together, strict=True):
                assert torch.equal(got[:5], clean[:5]) and torch.equal(got[6:], clean[6:])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_gate_beyond_all_bounds_is_open_or_shut(dtype: torch.dtype, gelu: bool) -> None:
    far = torch.finfo(dtype).max / 2
    gate = torch.tensor([[far, -far, 1000.0, -1000.0]], dtype=dtype)
    one = torch.ones_like(gate)
    for glu in (ops.glu_jvp, reference.glu_jvp):
        y, dy = glu(gate, one, one, torch.zeros_like(gate), gelu)
        assert torch.equal(y, gate.clamp(min=0)) and torch.equal(dy, torch.tensor([[1, 0, 1, 0]], dtype=dtype))


@needs_extension
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("attention")])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_nan_stays_in_its_sequence(op: str, dtype: torch.dtype) -> None:
    lengths, parent = (9, 6, 5, 11), (-1, 0, -1, -1)
    sizes = {"N": 31, "B": 4, "H": 2, "G": 1, "E": 8, "F": 8, "K": 1}
    arguments = testing.inputs(Case(op, sizes, dtype, lengths, parent=parent))
    arguments["q"][11, 1] = torch.nan  # the third token of the second segment
    arguments["k"][15, 0] = torch.nan  # the first token of the third segment, which no other attends to
    outputs = call(Case(op, sizes, dtype), arguments)
    for j, x in enumerate(outputs):
        tokens = x.movedim(-3, 0) if x.dim() > 2 else x
        assert not tokens[20:].isnan().any()
        of_keys = op == "attention_backward" and j > 0  # only the first key's weights are not finite
        assert tokens[15 : 16 if of_keys else 20].isnan().flatten(1).any(1).all()
    assert outputs[0][11, 1].isnan().all() and not outputs[0][:11].isnan().any()


@needs_extension
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("attention")])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_sequence_does_not_see_its_neighbors(op: str, dtype: torch.dtype) -> None:
    lengths, parent, alone = (40, 17, 90, 23), (-1, -1, 1, 1), slice(40, 170)
    sizes = {"N": 170, "B": 4, "H": 4, "G": 2, "E": 20, "F": 40, "K": 2}
    case = Case(op, sizes, dtype, lengths, parent=parent, window=70, softcap=9.0)
    arguments = testing.inputs(case)

    def rows(x: Tensor) -> Tensor:
        return x[:, alone] if x.dim() == 4 else x[alone]

    part = {name: rows(x) if floating(x) else x for name, x in arguments.items()}
    part |= {"cu_seqlens": offsets(0, 17, 107, 130), "parent": offsets(-1, 0, 0)}
    assert_same_bits(call(case, part), tuple(rows(x) for x in call(case, arguments)))


def heads_first(x: Tensor) -> Tensor:
    """x (..., N, H, E) as transformers hands it over: a transposed view of (..., H, N, E)."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


@pytest.mark.parametrize("op", [op for op in OPS if op.startswith(("attention", "rotary"))])
def test_heads_may_come_before_tokens(op: str) -> None:
    for case in CASES:
        if case.op == op and case.dtype in (torch.float32, torch.bfloat16):
            arguments = testing.inputs(case)
            views = {k: heads_first(x) if floating(x) and x.dim() > 2 else x for k, x in arguments.items()}
            assert_same_bits(call(case, views), call(case, arguments))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    for case in (LARGEST[op], next(c for c in FLOAT64 if c.op == op)):
        arguments = testing.inputs(case)
        if op in SMALL:
            arguments = {k: x.requires_grad_() if floating(x) else x for k, x in arguments.items()}
        torch.library.opcheck(getattr(torch.ops.u2a_fast, op).default, (), arguments)


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


SMALL = {
    "attention": Case(
        "attention",
        {"N": 9, "B": 4, "H": 4, "G": 2, "E": 3, "F": 2},
        torch.float64,
        (3, 0, 2, 4),
        softcap=2.0,
        parent=(-1, 0, 0, -1),
        window=3,
    ),
    "ghost_dot": Case("ghost_dot", {"N": 5, "B": 3, "I": 3, "O": 4, "K": 2}, torch.float64, (2, 0, 3)),
    "linear_logprob": Case("linear_logprob", {"N": 4, "D": 3, "V": 6}, torch.float64, bias=True, softcap=2.0),
}


@pytest.mark.parametrize("op", SMALL)
def test_gradcheck(op: str) -> None:
    arguments = testing.inputs(SMALL[op])
    names = [name for name, x in arguments.items() if floating(x)]

    def function(*values: Tensor) -> Any:
        out = getattr(ops, op)(**(arguments | dict(zip(names, values, strict=True))))
        return out[0] if op == "attention" else out  # the log-sum-exp has no gradient

    assert torch.autograd.gradcheck(function, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("needed", ["h", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_needed_gradients_come_in_the_inputs_dtype(needed: str, dtype: torch.dtype) -> None:
    case = Case("linear_logprob", {"N": 9, "D": 20, "V": 50}, dtype, bias=True)
    arguments = testing.inputs(case)
    arguments[needed].requires_grad_()
    logp, lse = ops.linear_logprob(**arguments)
    weights = torch.linspace(-1, 2, 9)
    (logp * weights + lse * weights.flip(0)).sum().backward()
    want = reference.linear_logprob_backward(
        weights, weights.flip(0), arguments["h"], arguments["weight"], arguments["target"], lse, arguments["bias"]
    )[["h", "weight", "bias"].index(needed)]
    got = arguments[needed].grad
    assert got.dtype == dtype
    # the largest entry is rounded to dtype, and so may dz have been
    assert (got.double() - want.double()).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    assert all(arguments[name].grad is None for name in ("h", "weight", "bias") if name != needed)


@pytest.mark.parametrize("op", [op for op in OPS if op not in _register._BACKWARDS])
def test_ops_without_a_backward_say_so(op: str) -> None:
    arguments = {k: x.requires_grad_() if floating(x) else x for k, x in testing.inputs(LARGEST[op]).items()}
    outputs = getattr(ops, op)(**arguments)
    total = sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    with pytest.raises(RuntimeError, match=rf"\[{op}\] has no backward"):
        total.backward()


def ghost(**changes: Any) -> dict[str, Any]:
    return {
        "a": torch.zeros(6, 3),
        "g": torch.zeros(6, 4),
        "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
        "v": torch.zeros(1, 4, 3),
    } | changes


def thin(**factors: Tensor) -> dict[str, Any]:
    return {name: x for name, x in ghost().items() if name != "v"} | factors


def head(**changes: Any) -> dict[str, Any]:
    base = {"h": torch.zeros(5, 3), "weight": torch.zeros(7, 3), "target": torch.zeros(5, dtype=torch.int64)}
    return base | changes


def norm(**changes: Any) -> dict[str, Any]:
    return {"x": torch.zeros(5, 3), "dx": torch.zeros(5, 3), "scale": torch.zeros(3)} | changes


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def sketch(**changes: Any) -> dict[str, Any]:
    arguments = ghost(dim=64, seed=0)
    del arguments["v"]
    return arguments | changes


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("ghost_dot", ghost(g=torch.zeros(5, 3)), ValueError, "g of shape (N, O) with N = 6 (from a), got (5, 3)"),
    ("ghost_dot", ghost(a=torch.zeros(6)), ValueError, "a of shape (N, I), got (6,)"),
    (
        "ghost_dot",
        ghost(v=torch.zeros(1, 3, 4)),
        ValueError,
        "v of shape (K, O, I) with O = 4 (from g), I = 3 (from a), got (1, 3, 4)",
    ),
    ("ghost_dot", ghost(g=[[0.0]]), TypeError, "g to be a Tensor, got list"),
    (
        "ghost_dot",
        ghost(g=torch.zeros(6, 4).double()),
        TypeError,
        "g of dtype torch.float32 (from a), got torch.float64",
    ),
    (
        "ghost_dot",
        ghost(a=torch.zeros(6, 3, dtype=torch.int64)),
        TypeError,
        "a of dtype torch.float16 or torch.bfloat16 or torch.float32 or torch.float64, got torch.int64",
    ),
    (
        "ghost_dot_lowrank",
        thin(left=torch.zeros(1, 4, 2), right=torch.zeros(1, 3, 3)),
        ValueError,
        "right of shape (K, I, R) with K = 1 (from left), I = 3 (from a), R = 2 (from left), got (1, 3, 3)",
    ),
    (
        "grad_project",
        thin(p_in=torch.zeros(4, 2), p_out=torch.zeros(4, 2)),
        ValueError,
        "p_in of shape (I, P) with I = 3 (from a), got (4, 2)",
    ),
    (
        "grad_project",
        thin(p_in=torch.zeros(3, 2), p_out=torch.zeros(4, 2).double()),
        TypeError,
        "p_out of dtype torch.float32 (from a), got torch.float64",
    ),
    ("ghost_dot", ghost(v=torch.zeros(1, 4, 3, device="meta")), ValueError, "v on cpu (from a), got meta"),
    (
        "ghost_dot",
        ghost(cu_seqlens=torch.tensor([0, 6])),
        TypeError,
        "cu_seqlens of dtype torch.int32, got torch.int64",
    ),
    ("ghost_dot", ghost(cu_seqlens=offsets()), ValueError, "cu_seqlens of shape (B + 1,), got (0,)"),
    ("ghost_dot", ghost(cu_seqlens=offsets(1, 6)), ValueError, "cu_seqlens to start at 0, got 1"),
    ("ghost_dot", ghost(cu_seqlens=offsets(0, 5)), ValueError, "cu_seqlens to end at N = 6 (from a), got 5"),
    (
        "ghost_dot",
        ghost(cu_seqlens=offsets(0, 4, 3, 6)),
        ValueError,
        "cu_seqlens to be non-decreasing, got 4 then 3 at position 1",
    ),
    (  # so many that they are checked by NumPy
        "ghost_dot",
        ghost(cu_seqlens=offsets(*[0] * 700, 4, 3, *[6] * 700)),
        ValueError,
        "cu_seqlens to be non-decreasing, got 4 then 3 at position 700",
    ),
    (
        "ghost_dot",
        ghost(cu_seqlens=offsets(*[0] * 700, 5)),
        ValueError,
        "cu_seqlens to end at N = 6 (from a), got 5",
    ),
    ("grad_sketch", sketch(dim=31), ValueError, "dim an int from 32 to 8192, got 31"),
    ("grad_sketch", sketch(dim=64.0), ValueError, "dim an int from 32 to 8192, got 64.0"),
    ("grad_sketch", sketch(seed=-1), ValueError, "seed an int from 0 to 9223372036854775807, got -1"),
    (
        "linear_logprob",
        head(weight=torch.zeros(7, 2)),
        ValueError,
        "weight of shape (V, D) with D = 3 (from h), got (7, 2)",
    ),
    (
        "linear_logprob",
        head(target=torch.zeros(5, dtype=torch.int32)),
        TypeError,
        "target of dtype torch.int64, got torch.int32",
    ),
    (
        "linear_logprob",
        head(target=torch.tensor([0, 1, 7, 0, 0])),
        ValueError,
        "target in [0, V) with V = 7 (from weight), got 7 at position 2",
    ),
    ("linear_logprob", head(bias=torch.zeros(6)), ValueError, "bias of shape (V,) with V = 7 (from weight), got (6,)"),
    ("linear_logprob", head(softcap=-1.0), ValueError, "softcap finite and >= 0, got -1.0"),
    ("linear_logprob_jvp", head(), ValueError, "dh or dweight to be given, got neither"),
    (
        "linear_logprob_jvp",
        head(dh=torch.zeros(2, 5, 3), dweight=torch.zeros(1, 7, 3)),
        ValueError,
        "dweight of shape (K, V, D) with K = 2 (from dh), V = 7 (from weight), D = 3 (from h), got (1, 7, 3)",
    ),
    (
        "linear_logprob_backward",
        head(grad_logp=torch.zeros(5).double(), grad_lse=torch.zeros(5), lse=torch.zeros(5)),
        TypeError,
        "grad_logp of dtype torch.float32 (for h of torch.float32), got torch.float64",
    ),
    (
        "glu_jvp",
        dict.fromkeys(("gate", "up", "dgate"), torch.zeros(5, 3)) | {"dup": torch.zeros(5, 4)},
        ValueError,
        "dup of shape (N, I) with N = 5 (from gate), I = 3 (from gate), got (5, 4)",
    ),
    (
        "rms_norm_jvp",
        norm(scale=torch.zeros(3).double()),
        TypeError,
        "scale of dtype torch.float32 (for x of torch.float32), got torch.float64",
    ),
    ("rms_norm_jvp", norm(dscale=torch.zeros(4)), ValueError, "dscale of shape (D,) with D = 3 (from x), got (4,)"),
    ("rms_norm_jvp", norm(eps=-1e-6), ValueError, "eps finite and >= 0, got -1e-06"),
    (
        "rotary",
        {"x": torch.zeros(5, 2, 3), "cosine": torch.zeros(5, 3), "sine": torch.zeros(5, 3)},
        ValueError,
        "x of an even number of features, got 3",
    ),
]


@pytest.mark.parametrize(("op", "arguments", "kind", "text"), WRONG, ids=[f"{op}-{text}" for op, _, _, text in WRONG])
def test_wrong_arguments(op: str, arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        getattr(ops, op)(**arguments)
    assert str(raised.value) == f"[{op}] expected {text}"


@needs_extension
def test_kernels_guard_memory_below_the_checks() -> None:
    for wrong in (offsets(0, 7), offsets(0, 5, 2, 6), offsets(-1, 6)):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.u2a_fast.ghost_dot(**ghost(cu_seqlens=wrong))
    with pytest.raises(RuntimeError, match="v: wrong length"):
        torch.ops.u2a_fast.ghost_dot(**ghost(v=torch.zeros(1, 4, 2)))
    with pytest.raises(RuntimeError, match="right: wrong length"):
        torch.ops.u2a_fast.ghost_dot_lowrank(**thin(left=torch.zeros(1, 4, 2), right=torch.zeros(1, 4, 2)))
    with pytest.raises(RuntimeError, match="p_in: wrong length"):
        torch.ops.u2a_fast.grad_project(**thin(p_in=torch.zeros(2, 2), p_out=torch.zeros(4, 2)))
    part = thin(p_in=torch.ones(3, 2), p_out=torch.ones(4, 2), cu_seqlens=offsets(2, 2, 5))
    assert torch.ops.u2a_fast.grad_project(**part).shape == (2, 2, 2)  # offsets that leave tokens out at both ends
    with pytest.raises(RuntimeError, match="target"):
        torch.ops.u2a_fast.linear_logprob(**head(target=torch.full((5,), -1)))
    with pytest.raises(RuntimeError, match="scale: wrong length"):
        torch.ops.u2a_fast.rms_norm_jvp(**norm(scale=torch.zeros(2)))


def test_compiles_without_graph_breaks() -> None:
    arguments = testing.inputs(LARGEST["ghost_dot"])

    def score(**given: Tensor) -> Tensor:
        return ops.ghost_dot(**given) * 2

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**arguments), score(**arguments))
