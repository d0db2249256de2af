"""PyTorch and transformers alone: the forward pass that is the unit, torch.func, and the public U2A procedure."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.peers.task import Example, Scorer, Task, mean_nll, ordered


def forward(task: Task) -> Scorer:
    """NLL of every example, in batches sorted by length: what one unit is."""
    model = task.model

    # user code: forward
    def nll(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return mean_nll(model(ids, use_cache=False).logits, labels)

    # end
    return lambda examples: ordered(task, examples, nll)


def forward_jvp(task: Task) -> Scorer:
    """Forward mode; transformers' fused attention has none, so attention is its eager one."""
    model, direction = task.model, task.direction
    # user code: forward_jvp
    model.set_attn_implementation("eager")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def derivatives(ids: Tensor, labels: Tensor) -> Tensor:
        nll = lambda w: mean_nll(functional_call(model, w, (ids,), {"use_cache": False}).logits, labels)  # noqa: E731
        return jvp(nll, (weights,), (direction,))[1]

    # end
    def score(examples: Sequence[Example]) -> Tensor:
        with torch.no_grad():
            return ordered(task, examples, derivatives)

    return score


def vmap_grad(task: Task) -> Scorer:
    """Per-example gradients of all parameters, materialised, then contracted."""
    model, direction = task.model, task.direction
    if task.recipe is not None:  # vmap has no rule for every fused attention of a device
        model.set_attn_implementation("eager")
    # user code: vmap_grad
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def nll(w: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return mean_nll(functional_call(model, w, (ids[None],), {"use_cache": False}).logits, labels[None])[0]

    def derivatives(ids: Tensor, labels: Tensor) -> Tensor:
        gradients = vmap(grad(nll), in_dims=(None, 0, 0))(weights, ids, labels)
        return sum(g.flatten(1) @ direction[name].flatten() for name, g in gradients.items())

    # end
    return lambda examples: ordered(task, examples, derivatives)


def hooks(task: Task, size: int | None = None) -> Scorer:
    """Activation-only backward with hooks: every module's tangent, its weights replaced by the direction, times g."""
    model, direction = task.model, task.direction
    # user code: hooks hooks_single
    model.requires_grad_(False)
    tangents = {id(p): direction[name] for name, p in model.named_parameters()}
    parts: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        own = {name: tangents.get(id(p)) for name, p in module.named_parameters(recurse=False)}
        if None in own.values():  # this hook, called by its own call
            return
        dy = functional_call(module, own, args)
        output.requires_grad_().register_hook(lambda g: parts.append((g * dy).flatten(1).sum(1)))

    def derivatives(ids: Tensor, labels: Tensor) -> Tensor:
        watched = [m for m in model.modules() if list(m.parameters(recurse=False))]
        handles = [m.register_forward_hook(watch) for m in watched]
        nll = mean_nll(model(ids, use_cache=False).logits, labels)
        for handle in handles:
            handle.remove()
        parts.clear()
        nll.sum().backward()
        return torch.stack(parts).sum(0)

    # end
    return lambda examples: ordered(task, examples, derivatives, size=size)


def hooks_single(task: Task) -> Scorer:
    """The same one example at a time, without padding."""
    return hooks(task, size=1)


def public(task: Task, padded: int | None = None) -> Scorer:
    """The public procedure: one example at a time, its whole gradient by autograd, flattened and concatenated."""
    model, direction = task.model, task.direction
    # user code: public public_padded
    model.requires_grad_(True)
    names, weights = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([direction[name].flatten() for name in names])

    def derivative(ids: Tensor, labels: Tensor) -> Tensor:
        gradients = torch.autograd.grad(mean_nll(model(ids, use_cache=False).logits, labels)[0], weights)
        return torch.cat([g.flatten() for g in gradients]) @ flat

    # end
    def widened(ids: Tensor, labels: Tensor) -> Tensor:
        missing = max(0, (padded or 0) - ids.shape[1])
        pad = torch.nn.functional.pad
        return derivative(pad(ids, (0, missing)), pad(labels, (0, missing), value=-100))

    return lambda examples: ordered(task, examples, widened, size=1)


def public_padded(task: Task) -> Scorer:
    """The same with every example padded to the release's 256 tokens."""
    return public(task, padded=256)
