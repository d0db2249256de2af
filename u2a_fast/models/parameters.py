"""Which parameters count, by kind, by regular expression or by ``requires_grad``."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from u2a_fast.models.kinds import Kind, kind_of
from u2a_fast.models.quantized import compute_dtypes, dequantized_forwards, is_quantized

__all__ = [
    "KINDS",
    "evaluation_mode",
    "floating_parameters",
    "parameter_names",
    "precisions",
    "replaced_forwards",
    "selected_parameters",
]

KINDS = ("linear", "bias", "norm", "embedding", "lm_head", "lora")


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id of every parameter -> its name in ``model.named_parameters()``, which names tied ones once."""
    return {id(p): name for name, p in model.named_parameters()}


def floating_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that hold their entries as floating-point numbers, by name.

    Quantized weights are none, though 4 bits may be stored in a floating-point dtype.
    """
    stored = {id(module.weight) for module in model.modules() if is_quantized(module)}
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and id(p) not in stored}


def precisions(model: nn.Module, dtype: torch.dtype | None) -> set[torch.dtype]:
    """What a pass over the model computes in: ``dtype``, or its parameters' own; quantized layers may have theirs."""
    found = {dtype} if dtype is not None else {p.dtype for p in floating_parameters(model).values()}
    return found | compute_dtypes(model)


def _kinds(model: nn.Module) -> dict[int, set[str]]:
    """id of every parameter -> the kinds it belongs to (a tied embedding is both an embedding and the LM head)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    kinds: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        module_kind = kind_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            found = kinds.setdefault(id(parameter), set())
            if ".lora_" in f".{path}.{name}":
                found.add("lora")
            elif module is head:
                found.add("lm_head")
            elif module_kind is Kind.EMBEDDING:
                found.add("embedding")
            elif module_kind is Kind.NORM:
                found.add("norm")
            else:
                found.add("bias" if name.endswith("bias") else "linear")
    return kinds


def selected_parameters(model: nn.Module, select: str | Sequence[str] = "trainable") -> dict[str, nn.Parameter]:
    """Parameters of ``model`` by name, tied ones once, as ``model.named_parameters()`` names them.

    Args:
        model: a Hugging Face causal LM or a PEFT model around one.
        select: ``"trainable"`` (``requires_grad``), ``"all"`` (every floating-point parameter), ``"re:<regex>"``
            (searched in the name), or a sequence of kinds out of ``linear`` (weights of linear layers), ``bias``
            (their biases), ``norm`` (weights and biases of norms), ``embedding``, ``lm_head`` and ``lora``; one kind
            may be given as a string.

    Raises:
        ValueError: the selection is unknown or selects nothing.
    """
    named = floating_parameters(model)
    if select == "trainable":
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif select == "all":
        chosen = named
    elif isinstance(select, str) and select.startswith("re:"):
        try:
            pattern = re.compile(select.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"[parameters] expected a regular expression, got {select!r}: {error}") from error
        chosen = {name: p for name, p in named.items() if pattern.search(name)}
    else:
        wanted = {select} if isinstance(select, str) else set(select)
        if unknown := wanted - set(KINDS):
            raise ValueError(
                '[parameters] expected "trainable", "all", "re:<regex>" or kinds out of '
                f"{list(KINDS)}, got {sorted(unknown)}"
            )
        kinds = _kinds(model)
        chosen = {name: p for name, p in named.items() if kinds.get(id(p), set()) & wanted}
    if not chosen:
        raise ValueError(f"[parameters] the selection {select!r} matches no parameter of {type(model).__name__}")
    return chosen


@contextmanager
def replaced_forwards(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules with another forward in place of their class's own, for the duration of the block."""
    replaced: list[nn.Module] = []
    try:
        for module, forward in pairs:
            module.forward = forward
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


@contextmanager
def evaluation_mode(model: nn.Module, trainable: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """No dropout, gradients for ``trainable`` alone, quantized layers in their dequantized weights, for the block."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    keep = {id(p) for p in trainable}
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(id(p) in keep)
        with torch.enable_grad(), replaced_forwards(dequantized_forwards(model)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
