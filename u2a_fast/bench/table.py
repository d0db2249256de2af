"""Rows, cases and comparisons as tables for a terminal."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from u2a_fast.bench.compare import Comparison
from u2a_fast.bench.rows import Row, bandwidth, spread
from u2a_fast.testing import Case, cost

__all__ = ["case_table", "comparison_table", "row_table"]

_STYLES = {"slower": "bold red", "faster": "green", "machine": "yellow", "same": ""}


def _table(*columns: str, caption: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    for column in columns:
        words = column in ("case", "bound by", "verdict", "reason")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    return table


def case_table(cases: Sequence[Case]) -> Table:
    """What would run: the work of each case, and the flops a byte that decide what bounds it."""
    table = _table("case", "GFLOP", "MB", "flop/byte", caption=f"{len(cases)} cases")
    for case in cases:
        flops, moved = cost(case)
        table.add_row(case.id, f"{flops / 1e9:,.3g}", f"{moved / 1e6:,.3g}", f"{flops / max(moved, 1):,.3g}")
    return table


def row_table(rows: Sequence[Row]) -> Table:
    """What was measured, against the ceilings and the other ways to compute it; a loss in red."""
    table = _table(
        "case", "ms", "GFLOP/s", "GB/s", "of GEMM", "of memory", "of limit", "bound by", "x reference", "x PyTorch",
        caption="x: how many times as fast as; of limit: share of the roofline",
    )  # fmt: skip
    for row in rows:
        memory = bandwidth(row)
        arithmetic = row["flops"] / row["gemm_gflops"] >= row["bytes"] / memory
        table.add_row(
            row["case"], f"{spread(row)[1] * 1e3:,.4g}", f"{row['gflops']:,.0f}", f"{row['gbytes']:,.1f}",
            f"{row['of_gemm']:.0%}", f"{row['gbytes'] / memory:.0%}", f"{row['of_limit']:.0%}",
            "arithmetic" if arithmetic else "memory", *(_times(row[name][1]) for name in _AGAINST),
        )  # fmt: skip
    return table


_AGAINST = ("vs_reference", "vs_composition")


def _times(ratio: float) -> str:
    return f"[red]{ratio:.2f}[/]" if ratio < 1 else f"{ratio:.2f}"


def comparison_table(comparison: Comparison) -> Table:
    """Every case of both files, the slowest change first."""
    table = _table("case", "old ms", "new ms", "new / old", "counts from", "machine", "verdict")
    for change in sorted(comparison.changes, key=lambda change: -change.ratio):
        table.add_row(
            escape(change.case), f"{change.old * 1e3:,.4g}", f"{change.new * 1e3:,.4g}", f"{change.ratio:.3f}",
            f"{change.bound:.3f}", f"{change.machine:.3f}", change.verdict, style=_STYLES[change.verdict],
        )  # fmt: skip
    return table
