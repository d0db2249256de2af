"""Gated units with a short backward pass: which are found, that they compute what the model does, and are put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

from u2a_fast.models.gated import gated_form, short_gated_units

UNITS = {"llama": False, "mistral": False, "qwen3": False, "gemma2": True, "gemma3": True}


def units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "forward" in vars(module)]


def gradient(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a random contraction of theirs in the embeddings of the inputs."""
    size = model.get_input_embeddings().weight.shape[1]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, size, generator=draw).to(dtype).requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=draw).to(dtype))
    assert x.grad is not None
    return logits.detach(), x.grad


@contextmanager
def _called(module: nn.Module) -> Iterator[list[str]]:
    """Names of the autograd functions that the module's inputs to ``down_proj`` come from."""
    names: list[str] = []
    hook = module.down_proj.register_forward_pre_hook(lambda _, inputs: names.append(type(inputs[0].grad_fn).__name__))
    yield names
    hook.remove()


@pytest.mark.parametrize("family", UNITS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_gradients_are_the_models_own(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.build(family, dtype).requires_grad_(False).eval()
    logits, grad = gradient(model, dtype)
    with short_gated_units(model):
        found = units(model)
        assert len(found) == 2, "one in each of two layers"
        with _called(found[0]) as names:
            short_logits, short_grad = gradient(model, dtype)
        assert names == ["_GatedUnitBackward"]
    assert not units(model)
    assert (short_logits - logits).abs().max() <= tolerance * logits.abs().max()
    assert (short_grad - grad).abs().max() <= tolerance * grad.abs().max()


@pytest.mark.parametrize("family", UNITS)
def test_the_activation_is_told_from_random_inputs(family: str) -> None:
    unit = tiny.build(family, torch.float32).get_submodule("model.layers.0.mlp")
    assert gated_form(unit) is UNITS[family]
    unit.act_fn = nn.ReLU()
    assert gated_form(unit) is None


def test_what_is_not_understood_is_left_alone() -> None:
    for family, dtype in (("gpt2", torch.float32), ("phi", torch.float32), ("llama", torch.float64)):
        model = tiny.build(family, dtype)
        with short_gated_units(model):
            assert not units(model)
    unit = tiny.build("llama", torch.float32).get_submodule("model.layers.0.mlp")
    unit.forward = lambda x: x
    assert gated_form(unit) is None, "a forward that somebody else replaced"
