"""Are derivatives right on the user's own model? Every route and precision against autograd in float64."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import IGNORE_INDEX, Example
from u2a_fast.influence.derivatives import Direction
from u2a_fast.influence.routes import directional_derivatives
from u2a_fast.models.decoder import Decoder
from u2a_fast.models.parameters import evaluation_mode, floating_parameters, selected_parameters
from u2a_fast.models.quantized import compute_dtypes, dequantize, is_dequantizable
from u2a_fast.statistics import spearman

__all__ = ["BOUNDS", "Check", "SelftestReport", "random_examples", "selftest"]

# Relative errors of precision eps: a pass is a chain of some hundreds of sums, each off by a few eps of its own size.
# Above them something other than rounding is at work. Usual values are a tenth of them or less.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
RANKED = 8  # examples from which on a rank correlation says something
_ROUTES = {"forward": ("forward", 1), "reverse": ("reverse", 1), "reverse x 2": ("reverse", 2)}  # mode, directions


@dataclass(frozen=True)
class Check:
    """One route in one precision.

    Attributes:
        route: ``"forward"``, ``"reverse"``, or ``"reverse x 2"``: two directions in one pass, by other kernels:
            that direction and every other parameter of it.
        dtype: precision of the passes, by name.
        status: ``"ok"``, ``"fail"`` (the error exceeds the bound) or ``"skipped"`` (the route is not for this model).
        relative_error: ||found - exact|| / ||exact|| over the examples; None where skipped.
        bound: the largest error that rounding explains.
        spearman: rank correlation with the exact derivatives; None for fewer than 8 examples.
        detail: why it was skipped.
    """

    route: str
    dtype: str
    status: Literal["ok", "fail", "skipped"]
    relative_error: float | None
    bound: float
    spearman: float | None = None
    detail: str | None = None


@dataclass(frozen=True)
class SelftestReport:
    """What the routes' derivatives are worth on one model, along one random direction.

    Attributes:
        model: the model's class.
        examples, tokens: how many, and their scored tokens.
        parameters: entries of the direction.
        checks: one a route and precision.
    """

    model: str
    examples: int
    tokens: int
    parameters: int
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """No check failed, and in every precision a route was checked."""
        checked = {check.dtype for check in self.checks if check.status == "ok"}
        return all(check.status != "fail" for check in self.checks) and checked == {c.dtype for c in self.checks}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {"healthy": self.healthy, **asdict(self)}


def selftest(
    model: nn.Module,
    examples: Sequence[Example] | None = None,
    *,
    count: int = 8,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    parameters: str | Sequence[str] = "trainable",
    token_budget: int | None = None,
    seed: int = 0,
) -> SelftestReport:
    """Compare <v, grad NLL_i> by every route and precision with autograd, one example at a time, in float64.

    The truth is that of a float64 copy of the model, run by transformers alone: nothing of this package takes part.
    Layers that bitsandbytes quantized are plain linear layers there, of the weights that it dequantizes.

    Args:
        model: a transformers causal LM or a PEFT model around one; left as it was found.
        examples: the first ``count`` are used; None: random ones.
        count: of examples.
        dtypes: precisions of the passes, keys of ``BOUNDS``.
        parameters: what the random direction v covers, as ``models.selected_parameters`` takes it.
        token_budget: most tokens a batch, as ``directional_derivatives`` takes it.
        seed: of the direction and of random examples.

    Raises:
        ValueError: an option or an example is wrong, or the model's weights are quantized by another library.
        MemoryError: a float64 copy, its gradient and the direction do not fit beside the model.
    """
    if unknown := [dtype for dtype in dtypes if dtype not in BOUNDS]:
        raise ValueError(f"[selftest] expected dtypes out of {list(BOUNDS)}, got {unknown[0]}")
    if count < 1:
        raise ValueError(f"[selftest] expected a count of at least 1, got {count}")
    names = list(selected_parameters(model, parameters))
    _check_memory(model, names)
    decoder = Decoder(model)
    items = list(examples[:count]) if examples is not None else random_examples(decoder, count, seed)
    tokens = sum(decoder.pack(items).scored)
    direction = _random_direction(model, names, seed)
    directions = [direction, dict(list(direction.items())[::2])]
    exact = _exact(model, items, directions)
    checks = tuple(
        _check(model, items, directions, exact, route, dtype, token_budget) for dtype in dtypes for route in _ROUTES
    )
    return SelftestReport(
        type(decoder.lm).__name__, len(items), tokens, sum(v.numel() for v in direction.values()), checks
    )


def random_examples(decoder: Decoder, count: int, seed: int = 0) -> list[Example]:
    """Random tokens, 16 to 64 of them where the model's positions allow it; about half is a prompt that two share."""
    generator = torch.Generator().manual_seed(seed)
    longest = min(64, getattr(decoder.config, "max_position_embeddings", None) or 64)
    out: list[Example] = []
    for _ in range(count):
        length = int(torch.randint(longest // 4, longest + 1, (), generator=generator))
        ids = torch.randint(decoder.config.vocab_size, (length,), generator=generator)
        if len(out) % 2:
            prompt = out[-1]["input_ids"][: len(out[-1]["input_ids"]) // 2]
            ids = torch.cat([prompt, ids[length // 2 :]])
        else:
            prompt = ids[: length // 2]
        labels = ids.clone()
        labels[: len(prompt)] = IGNORE_INDEX
        out.append({"input_ids": ids, "labels": labels})
    return out


def _random_direction(model: nn.Module, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    return {name: torch.randn(named[name].shape, generator=generator).to(named[name].device) for name in names}


def _check_memory(model: nn.Module, names: Sequence[str]) -> None:
    named = floating_parameters(model)
    layers: list[Any] = [module for module in model.modules() if is_dequantizable(module)]
    known = {id(p) for p in (*named.values(), *(layer.weight for layer in layers))}
    if unknown := [name for name, p in model.named_parameters() if id(p) not in known]:
        raise ValueError(
            f"[selftest] expected floating-point weights or layers of bitsandbytes, got the quantized {unknown[0]}"
        )
    entries = sum(layer.in_features * layer.out_features for layer in layers)
    entries += sum(p.numel() for p in named.values()) + 2 * sum(named[name].numel() for name in names)
    needed = 8 * entries
    device = next(model.parameters()).device
    free = _free_memory(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"[selftest] expected {needed / 2**30:.1f} GiB of free memory on {device} for a float64 copy of the model, "
            f"its gradient and a direction (8 bytes each a parameter), got {free / 2**30:.1f} GiB: test a "
            "smaller model of the same family"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no such file outside of Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _exact(model: nn.Module, examples: Sequence[Example], directions: Sequence[Direction]) -> Tensor:
    """<v_k, grad NLL_i> of a direction and parts of it, (K, B), by autograd in float64.

    The model's own forward pass runs, on one example at a time.
    """
    direction = directions[0]
    exact: Any = dequantize(copy.deepcopy(model)).double()
    for module in exact.modules():
        if hasattr(module, "set_experts_implementation"):  # PyTorch's grouped products are not for float64
            module.set_experts_implementation("eager")
    named = dict(exact.named_parameters())
    wanted = [named[name] for name in direction]
    out = []
    with evaluation_mode(exact, wanted):
        for example in examples:
            ids, labels = (torch.as_tensor(example[key], device=wanted[0].device) for key in ("input_ids", "labels"))
            logits = exact(input_ids=ids[None], use_cache=False).logits[0, :-1]
            nll = nn.functional.cross_entropy(logits.double(), labels[1:].long(), ignore_index=IGNORE_INDEX)
            grads = torch.autograd.grad(nll, wanted, allow_unused=True)
            found = zip(direction.items(), grads, strict=True)
            parts = {name: 0.0 if g is None else (g * v.double()).sum().item() for (name, v), g in found}
            out.append([sum(parts[name] for name in part) for part in directions])
    return torch.tensor(out, dtype=torch.float64).T


def _check(
    model: nn.Module,
    examples: Sequence[Example],
    directions: Sequence[Direction],
    exact: Tensor,
    route: str,
    dtype: torch.dtype,
    token_budget: int | None,
) -> Check:
    # quantized layers round to a dtype of their own, float64 aside
    rounded = {dtype} if dtype == torch.float64 else {dtype} | compute_dtypes(model)
    mode, count = _ROUTES[route]
    name, bound = str(dtype).removeprefix("torch."), max(BOUNDS[each] for each in rounded)
    try:
        found = directional_derivatives(
            model, examples, directions[:count], mode=mode, dtype=dtype, token_budget=token_budget
        ).to("cpu", torch.float64)
    except NotImplementedError as error:
        return Check(route, name, "skipped", None, bound, detail=str(error))
    exact = exact[:count]
    relative = float((found - exact).norm() / exact.norm())
    ranking = spearman(found[0].numpy(), exact[0].numpy()) if len(examples) >= RANKED else None
    return Check(route, name, "ok" if relative <= bound else "fail", relative, bound, ranking)
