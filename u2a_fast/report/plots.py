"""The report's plots, each a PNG as bytes; made without pyplot, so that no global state and no display is involved."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "by_arm",
    "cumulative_gain",
    "forgetting_paths",
    "kinds_found",
    "realized_gain",
    "round_metric",
    "score_distribution",
    "weights_by_score",
]

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_SERIES = ("#2166ac", "#e08214", "#1b7837", "#b2182b", "#762a83", "#4d4d4d")
_KIND_COLORS = {"harmful": "#b2182b", "harmless": "#2166ac"}


def _png(
    draw: Callable[[Axes], None], title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (5.6, 3.5)
) -> bytes:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(xlabel, color=_INK, fontsize=9)
    axes.set_ylabel(ylabel, color=_INK, fontsize=9)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
    draw(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _color(kind: str, position: int) -> str:
    return _KIND_COLORS.get(kind, _SERIES[position % len(_SERIES)])


def _by_kind(kinds: np.ndarray | None, keep: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(name, mask) of every kind among the rows kept; one empty name where kinds are not known or too many."""
    names = sorted({str(kind) for kind in kinds}) if kinds is not None else []
    if not 1 < len(names) <= len(_SERIES):
        return [("", keep)]
    assert kinds is not None
    return [(name, keep & (kinds == name)) for name in names]


def score_distribution(score: np.ndarray, kinds: np.ndarray | None) -> bytes:
    """Histogram of the finite scores, by planted truth where known; the outer 0.5 % a side share the end bins."""

    def draw(axes: Axes) -> None:
        finite = np.isfinite(score)
        low, high = np.quantile(score[finite], [0.005, 0.995]) if finite.any() else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, 41)
        groups = _by_kind(kinds, finite)
        axes.hist(
            [np.clip(score[mask], edges[0], edges[-1]) for _, mask in groups],
            bins=list(edges),
            stacked=True,
            color=[_color(name, i) for i, (name, _) in enumerate(groups)],
            label=[name for name, _ in groups] if len(groups) > 1 else None,
        )
        axes.axvline(0, color=_INK, linewidth=1)

    return _png(draw, "Scores", "gain per unit of unlearning weight (right of 0: unlearning helps)", "negatives")


def cumulative_gain(score: np.ndarray) -> bytes:
    """Predicted gain of unlearning the n best, against n in random order."""

    def draw(axes: Axes) -> None:
        ordered = np.sort(score[np.isfinite(score)])[::-1]
        total = np.concatenate([[0.0], np.cumsum(ordered)])
        n = np.arange(len(total))
        axes.plot(n, total, color=_SERIES[0], linewidth=2, label="best first")
        axes.plot(
            n,
            n * (ordered.mean() if len(ordered) else 0.0),
            color=_MUTED,
            linestyle="--",
            label="random order, on average",
        )
        peak = int(total.argmax())
        axes.axvline(peak, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{peak} with s > 0", (peak, total.min()), (4, 4), textcoords="offset points", fontsize=8, color=_INK
        )

    return _png(draw, "Cumulative predicted gain", "negatives unlearned", "sum of scores")


def kinds_found(score: np.ndarray, kinds: np.ndarray, target: str) -> bytes:
    """How many of the negatives of one planted kind are among the n best."""

    def draw(axes: Axes) -> None:
        hit = (kinds == target)[np.argsort(-np.where(np.isfinite(score), score, -np.inf), kind="stable")]
        n = np.arange(len(hit) + 1)
        count = int(hit.sum())
        axes.plot(
            n, np.concatenate([[0], np.cumsum(hit)]), color=_color(target, 0), linewidth=2, label="best score first"
        )
        axes.plot(n, np.minimum(n, count), color=_INK, linewidth=1, linestyle=":", label="truth known")
        axes.plot(n, n * count / len(hit), color=_MUTED, linestyle="--", label="random order, on average")

    return _png(draw, f"Planted {target} answers found", "negatives, best score first", f"{target} among them")


def realized_gain(rows: Sequence[Mapping[str, Any]], rank_correlation: float) -> bytes:
    """First-order gain against the fall of the preference loss when one negative is really unlearned alone."""

    def draw(axes: Axes) -> None:
        predicted = np.array([row["predicted"] for row in rows], dtype=float)
        realized = np.array([row["realized"] for row in rows], dtype=float)
        known = [row.get("kind") for row in rows]
        kinds = np.array(known, dtype=object) if None not in known else None
        for i, (name, mask) in enumerate(_by_kind(kinds, np.isfinite(predicted) & np.isfinite(realized))):
            axes.scatter(predicted[mask], realized[mask], s=26, alpha=0.8, color=_color(name, i), label=name or None)
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.axvline(0, color=_INK, linewidth=0.8)

    title = f"Predicted against realized gain (Spearman {rank_correlation:.2f})"
    return _png(draw, title, "predicted: score s", "realized: fall of the preference loss")


def weights_by_score(score: np.ndarray, weight: np.ndarray) -> bytes:
    """Weight of every selected negative against its score."""

    def draw(axes: Axes) -> None:
        axes.scatter(score, weight, s=14, alpha=0.6, color=_SERIES[0])
        axes.axhline(1, color=_MUTED, linewidth=1, linestyle="--", label="mean weight")
        axes.set_ylim(bottom=0)

    return _png(draw, "Weights of the selection", "score", "weight")


def round_metric(name: str, values: Sequence[tuple[float, float]]) -> bytes:
    """One metric over the rounds, as (rounds done, value)."""

    def draw(axes: Axes) -> None:
        x, y = zip(*values, strict=True)
        axes.plot(x, y, marker="o", color=_SERIES[0], linewidth=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _png(draw, name, "rounds done", "", size=(3.7, 2.5))


def by_arm(rows: Sequence[Mapping[str, Any]], key: str, title: str, ylabel: str, before: float | None = None) -> bytes:
    """One figure of every arm in every seed; a line joins each seed's arms."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))

    def draw(axes: Axes) -> None:
        for seed in dict.fromkeys(row["seed"] for row in rows):
            values = {row["arm"]: row[key] for row in rows if row["seed"] == seed}
            axes.plot([arms.index(arm) for arm in values], list(values.values()), color=_GRID, linewidth=1, zorder=1)
        for i, arm in enumerate(arms):
            y = [row[key] for row in rows if row["arm"] == arm]
            axes.scatter([i] * len(y), y, s=22, alpha=0.8, color=_SERIES[i % len(_SERIES)], zorder=2)
        if before is not None:
            axes.axhline(before, color=_MUTED, linestyle="--", linewidth=1, label="before unlearning")
        axes.set_xticks(range(len(arms)), arms)

    return _png(draw, title, "", ylabel)


def forgetting_paths(paths: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bytes:
    """Held-out preference loss against how much each arm has forgotten, along its run."""

    def draw(axes: Axes) -> None:
        for i, (arm, path) in enumerate(paths.items()):
            x, y = zip(*path, strict=True)
            axes.plot(x, y, marker="o", markersize=3, color=_SERIES[i % len(_SERIES)], linewidth=1.6, label=arm)

    return _png(draw, title, "forgetting: rise of the negatives' mean NLL, nats a token", "held-out preference loss")
