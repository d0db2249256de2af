"""The Triton kernels against the float64 reference, over the case table of ``u2a_fast.testing``.

The tests run on the GPU through ``torch.ops`` where there is one, and through Triton's interpreter on CPU tensors. The
interpreter must be chosen before Triton is imported, so ``test_in_the_interpreter`` runs this file in its own process.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from u2a_fast import reference, testing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = tuple(reference.__all__)
CASES = tuple(case for case in testing.CASES if case.dtype != torch.float64)
# One process of the interpreter each, so that the cores share them.
SHARES = {
    "attention": "attention",
    "gradients": "ghost or grad",
    "others": "not attention and not ghost and not grad",
}
# What the interpreter runs of the case table, in flops: it takes seconds for a million, and computes in float32
# whatever the dtype of the inputs.
INTERPRETED_FLOPS = {torch.float32: 50_000_000, torch.bfloat16: 1_000_000, torch.float16: 500_000}

Run = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN, so that an entry which no program writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def device() -> str:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU; test_in_the_interpreter runs this test on the CPU")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def run(device: str) -> Run:
    """An op by name: its launcher itself under the interpreter, ``torch.ops`` on a GPU; always a tuple."""

    def call(op: str, **arguments: Any) -> tuple[Tensor, ...]:
        launcher = getattr(importlib.import_module(f"u2a_fast.kernels.{op}"), op)
        out = (launcher if INTERPRETED else getattr(torch.ops.u2a_fast, op))(**arguments)
        return out if isinstance(out, tuple) else (out,)

    return call


def _case(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> testing.Case:
    options: dict[str, Any] = {"bias": True, "softcap": 5.0} if op.startswith("linear") else {}
    if op.startswith(("attention", "ghost", "grad")):
        options["lengths"] = (3, 0, 20, sizes["N"] - 23)
        sizes["B"] = 4
    if op.startswith("attention"):
        options |= {"parent": (-1, -1, -1, 2), "window": 30, "softcap": 5.0}
    return testing.Case(op, sizes, dtype, **options)


HEADS = {"H": 4, "G": 2, "E": 20, "F": 36}


def _no_copy(contiguous: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def method(x: Tensor) -> Tensor:
        assert x.dim() < 3 or x.is_contiguous()
        return contiguous(x)

    return method


SMALL = {
    "attention": _case("attention", N=40, **HEADS),
    "attention_backward": _case("attention_backward", N=40, **HEADS),
    "attention_jvp": _case("attention_jvp", N=40, **HEADS, K=2),
    "ghost_dot": _case("ghost_dot", N=40, I=20, O=36, K=2),
    "ghost_dot_lowrank": _case("ghost_dot_lowrank", N=40, I=20, O=36, K=2, R=19),
    "ghost_norm": _case("ghost_norm", N=40, I=20, O=36),
    "glu_jvp": _case("glu_jvp", N=4, I=48),
    "grad_project": _case("grad_project", N=40, I=20, O=36, P=17, Q=5),
    "grad_sketch": _case("grad_sketch", N=40, I=20, O=36, M=100),
    "linear_logprob": _case("linear_logprob", N=35, D=20, V=150),
    "linear_logprob_backward": _case("linear_logprob_backward", N=35, D=20, V=150),
    "linear_logprob_jvp": _case("linear_logprob_jvp", N=35, D=20, V=150, K=2),
    "rms_norm_jvp": _case("rms_norm_jvp", N=11, D=48),
    "rotary": _case("rotary", N=4, H=3, E=20),
}


def _same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return len(got) == len(want) and all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(
    _version("triton") < (3, 7) and _version("numpy") >= (2, 4),
    reason="this Triton's interpreter makes numbers of arrays as NumPy 2.4 no longer does",
)
@pytest.mark.parametrize("share", SHARES)
def test_in_the_interpreter(share: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-k", SHARES[share]]
    # Under `python -m` the working directory comes first on the path, where a folder may shadow an installed package.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_the_reference(op: str, dtype: torch.dtype, run: Run, device: str) -> None:
    wrong = {}
    for case in CASES:
        if INTERPRETED and testing.cost(case)[0] > INTERPRETED_FLOPS[dtype]:
            continue
        if (case.op, case.dtype) == (op, dtype):
            arguments = testing.inputs(case, device)
            found = testing.violations(case, arguments, run(op, **arguments))
            wrong |= {case.id: found} if found else {}
    assert wrong == {}


@pytest.mark.parametrize("op", OPS)
def test_same_bits_twice(op: str, run: Run, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = testing.inputs(_redtype(SMALL[op], dtype), device)
        assert _same_bits(run(op, **arguments), run(op, **arguments))


def _redtype(case: testing.Case, dtype: torch.dtype) -> testing.Case:
    return replace(case, dtype=dtype)


# Hopper's copy engine reads the operands of 16 bits, pointers the others.
both_operands = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _strided(x: Tensor) -> Tensor:
    """The same values in a view whose every stride is odd and whose surroundings are NaN."""
    if not x.is_floating_point():
        return x
    wide = x.new_full([2 * n + 1 for n in x.shape], torch.nan)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


@pytest.mark.parametrize("op", OPS)
def test_views_need_no_copy_by_the_caller(op: str, run: Run, device: str) -> None:
    arguments = testing.inputs(SMALL[op], device)
    views = {name: _strided(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert _same_bits(run(op, **views), run(op, **arguments))


@both_operands
def test_a_row_pitch_is_read_in_place(dtype: torch.dtype, run: Run, device: str) -> None:
    arguments = testing.inputs(_case("ghost_dot", dtype, N=40, I=32, O=48, K=2), device)
    pitched = dict(arguments)
    for name in ("a", "g", "v"):
        x = arguments[name]
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 16), torch.nan)
        wide[..., : x.shape[-1]] = x
        pitched[name] = wide[..., : x.shape[-1]]
    assert _same_bits(run("ghost_dot", **pitched), run("ghost_dot", **arguments))


@both_operands
def test_an_example_does_not_depend_on_its_batch(dtype: torch.dtype, run: Run, device: str) -> None:
    arguments = testing.inputs(_redtype(SMALL["ghost_dot"], dtype), device)
    (together,) = run("ghost_dot", **arguments)
    bounds = arguments["cu_seqlens"].tolist()
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = {"a": arguments["a"][begin:end], "g": arguments["g"][begin:end], "v": arguments["v"]}
        cu_seqlens = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        assert _same_bits(run("ghost_dot", cu_seqlens=cu_seqlens, **alone), (together[:, i : i + 1],))


@pytest.mark.parametrize("op", ["attention", "attention_backward", "attention_jvp"])
def test_a_sequence_does_not_depend_on_its_batch(op: str, run: Run, device: str) -> None:
    """A prompt and its answers, between two neighbors and alone."""
    sizes = {"N": 170, "B": 5, **HEADS} | ({"K": 1} if op == "attention_jvp" else {})
    options: dict[str, Any] = {"lengths": (37, 20, 60, 33, 20), "parent": (-1, -1, 1, 1, -1)}
    case = testing.Case(op, sizes, window=70, softcap=5.0, **options)
    arguments = testing.inputs(case, device)

    def own(x: Tensor) -> Tensor:
        return x[..., 37:150, :, :] if x.dim() > 2 else x[37:150]

    part = {name: own(x) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}
    part["cu_seqlens"] = torch.tensor([0, 20, 80, 113], dtype=torch.int32, device=device)
    part["parent"] = torch.tensor([-1, 0, 0], dtype=torch.int32, device=device)
    assert _same_bits(run(op, **part), tuple(own(x) for x in run(op, **arguments)))


@pytest.mark.parametrize("op", ["attention", "attention_backward", "attention_jvp"])
def test_heads_before_tokens_are_read_in_place(op: str, run: Run, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = testing.inputs(SMALL[op], device)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    views = {k: heads_first(x) if isinstance(x, Tensor) and x.dim() > 2 else x for k, x in arguments.items()}
    wanted = run(op, **arguments)
    monkeypatch.setattr(Tensor, "contiguous", _no_copy(Tensor.contiguous))
    assert _same_bits(run(op, **views), wanted)


@both_operands
@pytest.mark.parametrize("op", ["linear_logprob", "linear_logprob_jvp"])
def test_a_token_does_not_depend_on_its_batch(op: str, dtype: torch.dtype, run: Run, device: str) -> None:
    arguments = testing.inputs(_redtype(SMALL[op], dtype), device)
    part = {name: x[7:19] if name in ("h", "target") else x for name, x in arguments.items()}
    if op == "linear_logprob_jvp":
        part["dh"] = arguments["dh"][:, 7:19]
    together = tuple(x[..., 7:19] for x in run(op, **arguments))
    assert _same_bits(run(op, **part), together)


@pytest.mark.parametrize("op", ["glu_jvp", "rms_norm_jvp", "rotary"])
def test_a_row_does_not_depend_on_its_batch(op: str, run: Run, device: str) -> None:
    arguments = testing.inputs(SMALL[op], device)
    n = SMALL[op].sizes["N"]
    part = {k: x[2:n] if isinstance(x, Tensor) and x.dim() > 1 else x for k, x in arguments.items()}
    assert _same_bits(run(op, **part), tuple(x[2:n] for x in run(op, **arguments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ghost_dot_by_tiles(dtype: torch.dtype, run: Run, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("u2a_fast.kernels.ghost_dot"), "DIRECTION_TOKENS", -1)
    case = _redtype(SMALL["ghost_dot"], dtype)
    arguments = testing.inputs(case, device)
    outputs = run(case.op, **arguments)
    assert testing.violations(case, arguments, outputs) == []
    assert _same_bits(run(case.op, **arguments), outputs)


def test_more_directions_than_one_pass_holds(run: Run, device: str) -> None:
    case = _case("linear_logprob_jvp", N=5, D=6, V=70, K=11)
    arguments = testing.inputs(case, device)
    assert testing.violations(case, arguments, run(case.op, **arguments)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_by_several_blocks_of_rows(
    dtype: torch.dtype, run: Run, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = importlib.import_module("u2a_fast.kernels.linear_logprob_backward")
    case = _redtype(SMALL["linear_logprob_backward"], dtype)
    arguments = testing.inputs(case, device)
    monkeypatch.setattr(backward, "LEAST_ROWS", 16)
    monkeypatch.setattr(backward, "WORKSPACE", 0)
    assert testing.violations(case, arguments, run(case.op, **arguments)) == []


def test_a_sketch_in_several_launches(run: Run, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = testing.inputs(SMALL["grad_sketch"], device)
    together = run("grad_sketch", **arguments)
    monkeypatch.setattr(importlib.import_module("u2a_fast.kernels.grad_sketch"), "WORKSPACE", 3000)
    assert _same_bits(run("grad_sketch", **arguments), together)


@pytest.mark.parametrize("dim", [32, 257, 2048])
def test_the_sketch_is_the_references(dim: int, run: Run, device: str) -> None:
    arguments = coordinates(dim, seed=2**62 + 2**33 + 5, device=device)
    assert _same_bits(run("grad_sketch", **arguments), (reference.grad_sketch(**arguments),))


def coordinates(dim: int, seed: int, device: str) -> dict[str, Any]:
    """Inputs that are rows of the identity, gradients that are integers: float32 adds the coordinates exactly."""
    i, o = 70, 131
    cu_seqlens = torch.tensor([0, 1, i], dtype=torch.int32, device=device)
    a = torch.eye(i, device=device)
    g = torch.arange(1.0, i * o + 1, device=device).reshape(i, o)
    return {"a": a, "g": g, "cu_seqlens": cu_seqlens, "dim": dim, "seed": seed}


def test_a_target_outside_the_vocabulary_gives_nan(run: Run, device: str) -> None:
    arguments = testing.inputs(SMALL["linear_logprob"], device)
    arguments["target"][:3] = torch.tensor([-100, 150, 1000])
    logp, lse = run("linear_logprob", **arguments)
    assert logp[:3].isnan().all() and logp[3:].isfinite().all() and lse.isfinite().all()


def test_a_bias_of_minus_infinity_excludes_a_word(run: Run, device: str) -> None:
    case = _case("linear_logprob", N=6, D=8, V=150)
    case = testing.Case(case.op, case.sizes, bias=True)
    arguments = testing.inputs(case, device)
    arguments["bias"][:140] = -torch.inf
    arguments["target"][:] = torch.arange(144, 150)
    kept = {**arguments, "weight": arguments["weight"][140:], "bias": arguments["bias"][140:]}
    kept["target"] = arguments["target"] - 140
    got = run("linear_logprob", **arguments)
    bounds = testing.budget(testing.Case(case.op, {**case.sizes, "V": 10}, bias=True), kept)
    for x, want, bound in zip(got, testing.expected(case, kept), bounds, strict=True):
        assert ((x.cpu().double() - want).abs() <= bound).all()


@both_operands
def test_a_not_finite_token_stays_in_its_example(dtype: torch.dtype, run: Run, device: str) -> None:
    arguments = testing.inputs(_redtype(SMALL["ghost_dot"], dtype), device)
    (clean,) = run("ghost_dot", **arguments)
    arguments["a"][5] = torch.nan
    (got,) = run("ghost_dot", **arguments)
    assert got[:, 2].isnan().all()
    assert torch.equal(got[:, [0, 1, 3]], clean[:, [0, 1, 3]])


def test_float64_is_the_reference(run: Run, device: str) -> None:
    case = _redtype(SMALL["ghost_norm"], torch.float64)
    arguments = testing.inputs(case, device)
    (got,) = run(case.op, **arguments)
    assert got.dtype == torch.float64
    assert torch.equal(got, reference.ghost_norm(**arguments))
