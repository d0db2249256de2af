"""Whole models on the GPU: derivatives of every route against float64 autograd on the CPU, and the same bits twice."""

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

import u2a_fast
from u2a_fast.influence.routes import make_pass

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; the routes run on the CPU elsewhere")

ROUTES = ("forward", "reverse")
FAMILIES = tuple(tiny.CONFIGS)


def directions_of(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.1 for name, p in model.named_parameters()}
        for _ in range(count)
    ]


def exact(family: str, count: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Directions, and the derivatives (count, B) of the tiny examples in float64 on the CPU, by the reverse route."""
    model = tiny.build(family, torch.float64)
    given = directions_of(model, count)
    with tiny.true_float64():
        return given, u2a_fast.directional_derivatives(model, tiny.examples(9), given, mode="reverse")


def moved(given: list[dict[str, Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return [{name: v.to("cuda", dtype) for name, v in direction.items()} for direction in given]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ROUTES)
def test_derivatives(family: str, mode: str) -> None:
    given, want = exact(family, 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 6e-2)):
        model = tiny.build(family, torch.float64).float().cuda()
        got = u2a_fast.directional_derivatives(
            model, tiny.examples(9), moved(given, torch.float32), mode=mode, dtype=dtype
        )
        assert relative(got, want) <= tolerance, dtype


@pytest.mark.parametrize("count", [3, 16])
def test_several_directions(count: int) -> None:
    given, want = exact("llama", count)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 6e-2)):
        model = tiny.build("llama", torch.float64).float().cuda()
        got = u2a_fast.directional_derivatives(model, tiny.examples(9), moved(given, torch.float32), dtype=dtype)
        assert relative(got, want) <= tolerance, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ROUTES)
def test_the_same_run_gives_the_same_bits(mode: str, dtype: torch.dtype) -> None:
    model = tiny.build("llama", dtype).cuda()
    (direction,) = moved(directions_of(model, 1), dtype)
    passes, _ = make_pass(model, [direction], mode=mode)
    with passes.running():
        first, *others = (passes(tiny.examples(9)).derivatives for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_batch_invariant_bits() -> None:
    model = tiny.build("llama", torch.bfloat16).cuda()
    (direction,) = moved(directions_of(model, 1), torch.bfloat16)
    items = tiny.examples(9)
    whole = u2a_fast.directional_derivatives(model, items, direction, batch_invariant=True)
    back = u2a_fast.directional_derivatives(model, items[::-1], direction, batch_invariant=True)
    assert torch.equal(whole, back.flip(0))


def test_low_rank_at_full_rank_is_exact() -> None:
    given, want = exact("llama", 1)
    model = tiny.build("llama", torch.float64).float().cuda()
    (direction,) = moved(given, torch.float32)
    got = u2a_fast.directional_derivatives(model, tiny.examples(9), direction, mode="lowrank", rank=64)
    assert relative(got, want[0]) <= 1e-5
