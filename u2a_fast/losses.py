"""Unlearning losses as functions of an example's NLL: l_i = phi(NLL_i), and their slopes phi'(NLL_i).

    ga, graddiff    phi(x) = -x                                          phi'(x) = -1
    npo             phi(x) = -(2 / beta) log sigma(beta (x - x_ref))     phi'(x) = -2 sigma(-beta (x - x_ref))

NPO: Zhang et al. 2024 (arXiv 2404.05868), per example. At x = x_ref its slope is -1, so it starts as gradient ascent;
it fades to 0 as x grows. GradDiff is gradient ascent on negatives beside a retain loss on positives, which is no
function of NLL_i and lives with the trainer.
"""

from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

__all__ = ["UNLEARNING_LOSSES", "unlearning_loss", "unlearning_slope"]

UNLEARNING_LOSSES = ("ga", "npo", "graddiff")


def _shifted(nll: Tensor, nll_ref: Tensor | None, beta: float) -> Tensor:
    """beta (x - x_ref) of NPO, with its arguments checked."""
    if nll_ref is None:
        raise ValueError('[unlearning loss] expected nll_ref for "npo", got None')
    if nll_ref.shape != nll.shape:
        raise ValueError(f"[unlearning loss] expected nll_ref of shape {tuple(nll.shape)}, got {tuple(nll_ref.shape)}")
    if not beta > 0:
        raise ValueError(f"[unlearning loss] expected beta > 0, got {beta}")
    return beta * (nll - nll_ref.to(nll))


def _check_name(name: str) -> None:
    if name not in UNLEARNING_LOSSES:
        raise ValueError(f"[unlearning loss] expected one of {list(UNLEARNING_LOSSES)}, got {name!r}")


def unlearning_loss(name: str, nll: Tensor, nll_ref: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """phi(NLL_i), the per-example loss that unlearning minimises.

    Args:
        name: ``"ga"``, ``"npo"`` or ``"graddiff"`` (whose forget part is that of ``"ga"``).
        nll: (B) answer NLLs in nats, reduced over tokens as the caller states.
        nll_ref: (B) the same at the reference model; needed by ``"npo"`` alone.
        beta: NPO's inverse temperature, 1/nats.

    Returns:
        (B) losses, differentiable in ``nll``.

    Raises:
        ValueError: an unknown name, or NPO without a matching ``nll_ref`` or with ``beta`` <= 0.
    """
    _check_name(name)
    if name == "npo":
        shifted = _shifted(nll, nll_ref, beta)
        return -(2 / beta) * logsigmoid(shifted)
    return -nll


def unlearning_slope(name: str, nll: Tensor, nll_ref: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """phi'(NLL_i), (B), of ``unlearning_loss`` with the same arguments; negative everywhere."""
    _check_name(name)
    if name == "npo":
        return -2 * sigmoid(-_shifted(nll, nll_ref, beta))
    return nll.new_full(nll.shape, -1.0)
