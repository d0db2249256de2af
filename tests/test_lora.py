"""LoRA layers with short passes: only where they compute what PEFT computes, and only for the block."""

from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import u2a_fast
from u2a_fast.influence.routes import make_pass
from u2a_fast.models.lora import short_lora


def _adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(tiny.build(family, dtype), config, autocast_adapter_dtype=False).eval()


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def _logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(9)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "options"), [("llama", {"lora_alpha": 7}), ("gpt2", {"fan_in_fan_out": True})])
def test_computes_what_peft_computes(family: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = _adapted(family, dtype, **options)
    layers, want = _layers(model), _logits(model)
    with short_lora(model):
        assert layers and all("forward" in vars(layer) for layer in layers)
        got = _logits(model)
    assert not any("forward" in vars(layer) for layer in layers)
    assert (got - want).abs().max() <= 40 * torch.finfo(dtype).eps * want.abs().max()


def _with_two_adapters(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"use_dora": True}, lambda model: None),
        ({}, _with_two_adapters),
        ({}, lambda model: model.merge_adapter()),
        ({}, lambda model: model.disable_adapter_layers()),
        ({}, lambda model: [layer.lora_A.float() for layer in _layers(model)]),
    ],
    ids=["dora", "two adapters", "merged", "disabled", "adapter of another dtype"],
)
def test_leaves_alone_what_is_something_else(options: dict[str, Any], change: Any) -> None:
    model = _adapted(**options)
    change(model)
    with short_lora(model):
        assert not any("forward" in vars(layer) for layer in _layers(model))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_derivatives_along_an_adapter_are_exact(mode: str) -> None:
    model, batch = _adapted(lora_alpha=7), tiny.examples(5)
    generator = torch.Generator().manual_seed(1)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    v = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in named}
    got = u2a_fast.directional_derivatives(model, batch, v, mode=mode)
    torch.testing.assert_close(got, tiny.per_example(model, batch, v), rtol=2e-5, atol=1e-8)


def test_the_reason_of_a_route_names_the_adapter() -> None:
    model = _adapted()
    v = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    assert "LoRA's own directions" in make_pass(model, [v])[1].reason
    assert "LoRA's own directions" in make_pass(model, [v, v])[1].reason
    beside = v | {"base_model.model.model.norm.weight": torch.zeros(32)}
    assert "LoRA" not in make_pass(model, [beside])[1].reason
