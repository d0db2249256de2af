"""Roofline plots (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785) of rows, as PNG or SVG.

A point is a case: flops a byte against flops a second. Its roof is the lower of the memory's rate times the intensity
and the rate of the matrix product, both as the rows themselves measured them (medians). The distance to the roof is
what a better kernel could gain: left of the ridge by moving fewer bytes, right of it by better arithmetic. Bytes are
the fewest possible, so a case that caches serve may lie above the slope.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from u2a_fast.bench.rows import Row, bandwidth, number
from u2a_fast.store.files import write_atomically

__all__ = ["FORMATS", "Setting", "draw_roofline", "roofline_format"]

FORMATS = (".png", ".svg")
_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_COLORS = ("#2166ac", "#e08214", "#1b7837", "#b2182b", "#762a83", "#4d4d4d", "#35978f", "#bf812d", "#c51b7d", "#80cdc1")
_DTYPES: dict[str, tuple[str, Any]] = {"float32": ("o", "-"), "bfloat16": ("^", "--"), "float16": ("s", ":")}

Setting = tuple[str, str, int]  # machine, device, CPU threads: what has ceilings of its own


def roofline_format(path: Path) -> str:
    """The format that ``path`` names, "png" or "svg"; ValueError for another."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"[bench] expected a plot named {' or '.join(FORMATS)}, got {path.name!r}")
    return path.suffix.lower()[1:]


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw the op rows into ``path``, one panel a machine, device and number of threads.

    Raises ValueError where no row is an op's, a row's numbers are no measurement, or the format is unknown.
    """
    kind = roofline_format(path)
    timed = [row for row in rows if row["benchmark"] == "ops"]
    if not timed:
        raise ValueError(f"[bench] expected rows of ops to draw, got {len(rows)} rows without one")
    panels: dict[Setting, list[Row]] = {}
    for row in timed:
        panels.setdefault(_setting(row), []).append(row)
    colors = {op: _COLORS[i % len(_COLORS)] for i, op in enumerate(sorted({row["op"] for row in timed}))}
    figure = Figure(figsize=(7.5 * len(panels), 5.2), layout="constrained")
    for axes, (setting, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, setting, group, colors)
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _writer(buffer.getvalue()))


def _writer(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _setting(row: Row) -> Setting:
    for name, kind in (("device", str), ("threads", int), ("op", str), ("dtype", str)):
        if not isinstance(row.get(name), kind):
            raise ValueError(f"[bench] expected {name} in the row of {row['case']}, got {row.get(name)!r}")
    return row["machine"], row["device"], row["threads"] if row["device"] == "cpu" else 0


def _panel(axes: Axes, setting: Setting, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    points = [(number(row, "flops") / number(row, "bytes"), number(row, "gflops"), row) for row in rows]
    memory = median(bandwidth(row) for row in rows)
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    peaks = {d: median(number(row, "gemm_gflops") for row in rows if row["dtype"] == d) for d in dtypes}
    ridges = [peak / memory for peak in peaks.values()]
    left, right = min(*ridges, *(x for x, _, _ in points)) / 3, max(*ridges, *(x for x, _, _ in points)) * 3
    for dtype, peak in peaks.items():
        ridge = peak / memory
        style = _DTYPES.get(dtype, ("o", "-"))[1]
        axes.plot([left, ridge, right], [left * memory, peak, peak], color=_INK, linewidth=1.2, linestyle=style)
        axes.annotate(f"{dtype} matrix product {peak:,.0f}", (right, peak), ha="right", va="bottom", fontsize=8)
    label, start = f"memory {memory:,.3g} GB/s", (left, left * memory)
    axes.annotate(label, start, xytext=(10, 0), textcoords="offset points", va="center", fontsize=8)
    for intensity, rate, row in points:
        marker = _DTYPES.get(row["dtype"], ("o", "-"))[0]
        axes.plot(intensity, rate, marker, color=colors[row["op"]], markersize=6, alpha=0.85, markeredgewidth=0)
    _dress(axes, setting, {op: color for op, color in colors.items() if any(row["op"] == op for row in rows)}, dtypes)


def _dress(axes: Axes, setting: Setting, colors: Mapping[str, str], dtypes: Sequence[str]) -> None:
    machine, device, threads = setting
    where = f", {threads} thread{'s' * (threads > 1)}" if device == "cpu" else ""
    axes.set(xscale="log", yscale="log", xlabel="flops a byte (least traffic)", ylabel="GFLOP/s")
    axes.set_title(f"{machine}{where}", loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_MUTED, labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
    ops = [Line2D([], [], marker="o", linestyle="", color=color, label=op) for op, color in colors.items()]
    kinds = [
        Line2D([], [], marker=marker, linestyle=line, color=_INK, label=dtype)
        for dtype in dtypes
        for marker, line in [_DTYPES.get(dtype, ("o", "-"))]
    ]
    axes.legend(handles=[*ops, *kinds], frameon=False, fontsize=8, loc="lower right", labelcolor=_INK)
