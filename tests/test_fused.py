"""Tangents in one pass: what is replaced and what is left alone, that it is put back, that derivatives agree."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from u2a_fast import ops
from u2a_fast.influence import forward
from u2a_fast.models.fused import fused_tangents

# RMS norms of two layers and at the end, the activation of gated units, and whether whole heads are rotated: gpt-neox
# hands over whole heads of which it turns a quarter, phi the half that it turns, gpt2 none.
FAMILIES: dict[str, tuple[int, str | None, bool]] = {
    "llama": (5, "silu", True),
    "mistral": (5, "silu", True),
    "qwen3": (9, "silu", True),
    "gemma2": (9, "gelu", True),
    "gemma3": (13, "gelu", True),
    "phi": (0, None, True),
    "gpt-neox": (0, None, False),
    "gpt2": (0, None, False),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny.build(family, dtype).requires_grad_(False)


def replaced(model: nn.Module) -> Counter[str]:
    forwards = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    names = {False: "silu", True: "gelu"}
    return Counter(names[f.args[1]] if f.func.__name__ == "_gated" else "norm" for f in forwards)


def unit(model: nn.Module) -> Any:
    return model.get_submodule("model.layers.0.mlp")


def rotary_of(model: nn.Module) -> Any:
    return getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_replaced_and_put_back(family: str) -> None:
    model = build(family)
    own = rotary_of(model)
    norms, activation, _ = FAMILIES[family]
    with fused_tangents(model):
        assert replaced(model) == +Counter({"norm": norms, activation or "": 2 * bool(activation)})
        assert (rotary_of(model) is own) == (own is None)
    assert not replaced(model) and rotary_of(model) is own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_tangents_the_model_runs_its_own_operations(family: str, dtype: torch.dtype) -> None:
    model, ids = build(family, dtype), torch.tensor([tiny.examples(1)[0]["input_ids"]])
    want = model(input_ids=ids, use_cache=False).logits
    with fused_tangents(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op of the block runs."""
    counted: Counter[str] = Counter()

    def counting(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counted[name] += 1
            return op(*arguments)

        return call

    for name in ("glu_jvp", "rms_norm_jvp", "rotary"):
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counted


def terms(model: nn.Module, example: dict[str, list[int]], v: dict[str, Tensor]) -> Tensor:
    """sum |v_j dNLL/dw_j|, the terms of which a derivative is the sum."""
    model.requires_grad_(True)
    grads = torch.autograd.grad(tiny.own_nll(model, example), list(model.parameters()), allow_unused=True)
    model.requires_grad_(False)
    pairs = zip(v.values(), grads, strict=True)
    return torch.stack([(d * g).abs().sum() for d, g in pairs if g is not None]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_agree_with_the_models_own_operations(
    family: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(family), tiny.examples(6)
    v = tiny.direction(model)
    passes = forward.ForwardPass(model, [v])
    with passes.running():
        calls.clear()
        got = passes(batch).derivatives[0]
    norms, activation, whole = FAMILIES[family]
    # queries and keys of two layers, value and tangent
    assert calls == +Counter({"rms_norm_jvp": norms, "glu_jvp": 2 * bool(activation), "rotary": 8 * whole})
    calls.clear()
    monkeypatch.setattr(forward, "fused_tangents", lambda model: nullcontext())
    with passes.running():
        want = passes(batch).derivatives[0]
    assert not calls
    scale = torch.stack([terms(model, example, v) for example in batch])
    # both round a sum of these terms (u2a_fast.testing)
    assert ((got - want).abs() <= 4 * torch.finfo(torch.float32).eps * scale).all()


def hooked(model: nn.Module) -> None:
    unit(model).act_fn.register_forward_hook(lambda module, arguments, out: None)


def watched(model: nn.Module) -> None:
    unit(model).act_fn.register_forward_pre_hook(lambda module, arguments: None)


def replaced_activation(model: nn.Module) -> None:
    class Own(nn.SiLU):
        pass

    unit(model).act_fn = Own()


def replaced_forward(model: nn.Module) -> None:
    unit(model).act_fn.forward = torch.nn.functional.silu


def another_activation(model: nn.Module) -> None:
    unit(model).act_fn = ACT2FN["gelu"]  # by erf


def clipped(model: nn.Module) -> None:
    class Clipped(type(unit(model))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-1, 1)

    unit(model).__class__ = Clipped


def own_forward(model: nn.Module) -> None:
    unit(model).forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [hooked, watched, replaced_activation, replaced_forward, another_activation, clipped, own_forward],
    ids=lambda change: change.__name__,
)
def test_a_unit_that_is_not_plain_is_left_alone(change: Callable[[nn.Module], None]) -> None:
    model = build("llama")
    change(model)
    before = dict(vars(unit(model)))
    with fused_tangents(model):
        assert vars(unit(model)) == before
        assert "forward" in vars(model.get_submodule("model.layers.1.mlp"))
    assert vars(unit(model)) == before


def test_all_is_put_back_after_an_error() -> None:
    model = build("llama")
    own = rotary_of(model)
    with pytest.raises(ZeroDivisionError), fused_tangents(model):
        assert replaced(model) and rotary_of(model) is not own
        raise ZeroDivisionError
    assert not replaced(model) and rotary_of(model) is own


def test_float64_models_keep_their_own() -> None:
    model = build("llama", torch.float64)
    own = rotary_of(model)
    with fused_tangents(model):
        assert not replaced(model) and rotary_of(model) is own
