"""Writes the tables of README.md and docs/benchmarks.md from the committed rows; no number there is typed by hand.

    python -m benchmarks.tables [--check]

A table stands between ``<!-- table: name -->`` and ``<!-- /table -->``. ``--check`` changes nothing and fails where a
table is not what the rows say.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/tables.py`

from benchmarks import ROOT
from benchmarks.rows import RESULTS
from u2a_fast.bench.rows import Row, read_rows

__all__ = ["TABLES", "main", "render"]

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
EMPTY = "No results yet: `make bench` and `make peers` measure, and write them here.\n"
GOAL_HEADER = ("goal", "bound", "measured", "met")
CONTESTANTS = {
    "forward": "forward pass, LM head on every token (the unit)",
    "forward_answer": "forward pass, LM head on answer tokens",
    "fp32": "u2a_fast, float32",
    "bf16": "u2a_fast, bfloat16",
    "batch_invariant": "u2a_fast, float32, batch_invariant",
    "lowrank16": "u2a_fast, low rank 16, float32",
    "lowrank32": "u2a_fast, low rank 32, float32",
    "lowrank64": "u2a_fast, low rank 64, float32",
    "public": "public U2A procedure, unpadded",
    "public_padded": "public U2A procedure, padded to 256 tokens",
}


def _grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def _by_machine(rows: list[Row], table: Callable[[list[Row]], str]) -> str:
    """One table a machine, each below a line that says what it was measured on and with."""
    parts = []
    for _, group in groupby(sorted(rows, key=_setting), key=_setting):
        mine = list(group)
        parts.append(f"{_origin(mine)}\n\n{table(mine)}")
    return "\n".join(parts) or EMPTY


def _setting(row: Row) -> tuple[str, int]:
    return row["machine"], 0 if row["gpu"] else row["threads"]


def _origin(rows: list[Row]) -> str:
    last = max(rows, key=lambda row: row["utc"])
    names = ("python", "torch", "triton", "transformers")
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in names if name in last["versions"])
    flags = "" if last["gpu"] else f" ({', '.join(last['cpu_flags'])})"
    threads = "" if last["gpu"] else f", {last['threads']} thread{'s' * (last['threads'] > 1)}"
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    commands = ", ".join(f"`{command}`" for command in sorted({_command(row) for row in rows}))
    return f"**{last['machine']}**{flags}{threads}; {versions}; commit {commits}; {last['utc'][:10]}; {commands}"


def _command(row: Row) -> str:
    """The row's command without what it was narrowed to and where it wrote."""
    return re.sub(r" --(out|filter|only) \S+", "", row["command"])


def _times(spread: Sequence[float]) -> str:
    """Median (p20 to p80) of a ratio; a loss in bold."""
    text = _spread(spread)
    return f"**{text}**" if spread[1] < 1 else text


def _spread(spread: Sequence[float]) -> str:
    """Median (p20 to p80)."""
    p20, p50, p80 = spread
    return f"{p50:.2f} ({p20:.2f} to {p80:.2f})"


def _ops(rows: list[Row]) -> str:
    header = ("case", "GFLOP/s", "GB/s", "of GEMM", "of copy", "of limit", "x reference", "x PyTorch", "x product")
    lines = [
        (
            f"`{row['case'].partition('-' + row['device'])[0]}`",
            f"{row['gflops']:,.0f}",
            f"{row['gbytes']:,.1f}",
            *(f"{row[key]:.0%}" for key in ("of_gemm", "of_copy", "of_limit")),
            *(_times(row[key]) for key in ("vs_reference", "vs_composition", "vs_product")),
        )
        for row in rows
    ]
    return _grid(header, lines)


def _scoring(rows: list[Row]) -> str:
    header = ("what runs", "units", "p20 to p80 of blocks", "examples/s against float32 u2a_fast")
    parts = []
    for row in sorted(rows, key=lambda row: row["case"], reverse=True):
        rate = row["examples_per_second"]
        lines = [
            (
                label,
                f"{row['units'][name]:.2f}",
                f"{row['units_spread'][name][0]:.2f} to {row['units_spread'][name][2]:.2f}",
                f"{rate[name] / rate['fp32']:.2f}",
            )
            for name, label in CONTESTANTS.items()
            if name in row["units"]
        ]
        setup = ", ".join(f"{name} {units:.2f}" for name, units in row["setup_units"].items())
        title = (
            f"`{row['case']}`: {row['parameters'] / 1e6:.1f} M parameters, {row['examples']} examples, "
            f"{row['tokens']:,} tokens; {row['gate']}; set up once, in units: {setup}."
        )
        parts.append(f"{title}\n\n{_grid(header, lines)}")
    return "\n".join(parts)


def _goals(rows: list[Row]) -> str:
    found = {(row["benchmark"], row["case"]): row for row in rows}
    lines: list[tuple[str, str, str, str]] = []
    for (benchmark, case), what, value, at_most, bound in GOALS:
        row = found.get((benchmark, case))
        if row is None:
            continue
        try:
            lines.append(_goal(what, value(row), bound, at_most=at_most))
        except KeyError:
            lines.append((what, _bound(bound, at_most), "not timed", "**no**"))
    return _grid(GOAL_HEADER, lines + _ghost_dot_goals(rows))


def _ghost_dot_goals(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    what = "over a square product's time for its flops, worst of"
    lines = []
    for dtype in ("float32", "bfloat16"):
        cases = [row for row in rows if _is_one_direction(row) and dtype in row["case"]]
        for part, key in (("in C++", "kernel_of_gemm"), ("with argument checks and autograd", "of_gemm")):
            times = [1 / row[key] for row in cases if key in row]
            if times:
                name = f"ghost_dot, {dtype}, {part}, {what} {len(times)} sizes"
                lines.append(_goal(name, max(times), 1.1, at_most=True))
    return lines


def _is_one_direction(row: Row) -> bool:
    own = row["case"].startswith("ghost_dot-") and "-K1-" in row["case"]
    return own and (row["benchmark"], row["device"]) == ("ops", "cpu")


def _unmeasured(rows: list[Row]) -> str:
    """Goals that no machine has a row for."""
    there = {(row["benchmark"], row["case"]) for row in rows}
    lines = [(what, _bound(bound, at_most)) for case, what, _, at_most, bound in GOALS if case not in there]
    if not any((row["benchmark"], row["device"]) == ("peers", "cuda") for row in rows):
        lines.append(("exact against the fastest exact peer on a GPU, 128 tokens, 19 M and 1 B", _bound(2, False)))
    return _grid(GOAL_HEADER[:2], lines) if lines else "None: every goal has a row.\n"


def _bound(bound: float, at_most: bool) -> str:
    return f"{'at most' if at_most else 'at least'} {bound:g}"


def _goal(what: str, number: float, bound: float, *, at_most: bool = False) -> tuple[str, str, str, str]:
    met = number <= bound if at_most else number >= bound
    return what, _bound(bound, at_most), f"{number:.4g}", "yes" if met else "**no**"


def _units(name: str) -> Callable[[Row], float]:
    return lambda row: row["units"][name]


def _speed(name: str) -> Callable[[Row], float]:
    return lambda row: row["speedup"][name]["total"]


def _prompts(row: Row) -> float:
    return row["pair_ratio"][1]


def _routes_memory(row: Row) -> float:
    return row["forward_mib"] / row["reverse_mib"]


def _ratio(name: str) -> Callable[[Row], float]:
    return lambda row: row["ratios"][name][1]


def _of_gemm(row: Row) -> float:
    return row["of_gemm"][1]


def _tokens_a_second(row: Row) -> float:
    return max(row["tokens_per_second"].values())


LLAMA, HH = ("score", "llama"), ("score", "hh")
LARGE_GHOST_DOT = tuple((("large", f"ghost_dot-{size}-cuda"), size) for size in ("4096x4096", "4096x14336"))
LARGE_HEAD = ("large", "linear_logprob-4096x128256-cuda")
LARGE_ATTENTION = tuple(
    (("large", f"attention_jvp-E{e}-T{t}-cuda"), f"heads of {e}, {t} tokens") for e in (64, 128) for t in (2048, 8192)
)
# (benchmark, case), what is measured, the figure, whether the bound is an upper one, the bound
GOALS: tuple[tuple[tuple[str, str], str, Callable[[Row], float], bool, float], ...] = (
    (LLAMA, "one direction over a forward pass, float32, 20 M Llama", _units("fp32"), True, 3.1),
    (HH, "the same, HH", _units("fp32"), True, 3.1),
    (("routes", "lora"), "LoRA of rank 16 on all linears over a forward pass", _units("forward fp32"), True, 2.2),
    (LLAMA, "low rank 16 over a forward pass, 20 M Llama", _units("lowrank16"), True, 2.3),
    (HH, "the same, HH", _units("lowrank16"), True, 2.3),
    (HH, "HH: Spearman of low rank 16 against exact", lambda row: row["spearman"]["lowrank16"], False, 0.98),
    (("routes", "directions"), "16 directions over a forward pass", _units("reverse fp32"), True, 3.6),
    (("routes", "shared"), "8 answers a prompt, prompts once over every time", _prompts, True, 0.65),
    (LLAMA, "bfloat16 over float32, examples/s, 20 M Llama", _speed("bf16 over fp32"), False, 3),
    (HH, "the same, HH", _speed("bf16 over fp32"), False, 3),
    (
        ("routes", "llama"),
        "relative error of bfloat16, 20 M Llama",
        lambda r: r["norm_error"]["forward bf16"],
        True,
        0.01,
    ),
    (("routes", "hh"), "the same, HH", lambda row: row["norm_error"]["forward bf16"], True, 0.01),
    (LLAMA, "Spearman of bfloat16 against float32, 20 M Llama", lambda row: row["spearman_bf16"], False, 0.999),
    (HH, "the same, HH", lambda row: row["spearman_bf16"], False, 0.999),
    (HH, "HH: float32 over the public procedure, padded", _speed("fp32 over public_padded"), False, 1.4),
    (HH, "HH: bfloat16 over the public procedure, padded", _speed("bf16 over public_padded"), False, 3),
    (("memory", "layers-8"), "peak memory, forward over reverse, 8 layers", _routes_memory, True, 0.4),
    (("memory", "layers-32"), "the same, 32 layers", _routes_memory, True, 0.4),
    *(
        (case, f"ghost_dot {size}: rate over the square product's", _of_gemm, False, 0.75)
        for case, size in LARGE_GHOST_DOT
    ),
    *(
        (
            case,
            f"ghost_dot {size} against product, elementwise, sum",
            _ratio("product, elementwise, sum over op"),
            False,
            1.15,
        )
        for case, size in LARGE_GHOST_DOT
    ),
    (LARGE_HEAD, "linear_logprob, 128 k words: rate over the square product's", _of_gemm, False, 0.7),
    (LARGE_HEAD, "the same against Liger's fused linear cross-entropy", _ratio("liger over op"), False, 1),
    *(
        (case, f"attention's tangent over its forward, {what}", _ratio("op over forward"), True, 2.8)
        for case, what in LARGE_ATTENTION
    ),
    *(
        (case, f"the same against jvp_flash_attention, {what}", _ratio("jvp_flash_attention over op"), False, 2)
        for case, what in LARGE_ATTENTION
    ),
    (
        ("throughput", "Llama-3.2-1B-cuda"),
        "one direction over a forward pass, bfloat16, shape of Llama 3.2 1B",
        lambda row: min(units[1] for units in row["units"].values()),
        True,
        3.2,
    ),
    (("throughput", "Llama-3.2-1B-cuda"), "tokens a second, shape of Llama 3.2 1B", _tokens_a_second, False, 66_000),
    (("throughput", "Llama-3.1-8B-cuda"), "tokens a second, shape of Llama 3.1 8B", _tokens_a_second, False, 8_200),
)


ROUTES = {
    "llama": "one direction, 20 M Llama",
    "hh": "one direction, HH",
    "lora": "LoRA of rank 16 on all linears",
    "shared": "eight answers a prompt",
    "directions": "16 directions",
}


def _routes(rows: list[Row]) -> str:
    header = (
        "what runs",
        "units",
        "p20 to p80 of blocks",
        "relative error",
        "largest error of an example",
        "Spearman against the first",
    )
    found = {row["case"]: row for row in rows}
    lines = []
    for case, label in ROUTES.items():
        row = found.get(case, {"units": {}})
        for name, units in row["units"].items():
            p20, _, p80 = row["units_spread"][name]
            errors = (f"{row[kind][name]:.1e}" for kind in ("norm_error", "relative_error"))
            what, ranking = f"{label}: {name}", f"{row['spearman'][name]:.4f}"
            lines.append((what, f"{units:.2f}", f"{p20:.2f} to {p80:.2f}", *errors, ranking))
    return _grid(header, lines)


def _large(rows: list[Row]) -> str:
    lines = [
        (
            f"`{row['case'].removesuffix('-cuda')}`",
            f"{row['gflops']:,.0f}",
            f"{row['of_gemm'][1]:.0%}",
            "; ".join(f"{name}: {_spread(ratio)}" for name, ratio in row["ratios"].items()),
        )
        for row in rows
    ]
    return _grid(("workload", "GFLOP/s", "of the square product", "ratios of times"), lines)


def _throughput(rows: list[Row]) -> str:
    header = ("model", "route", "tokens/s", "units", "of the product")
    lines = []
    for row in rows:
        for route, rate in row["tokens_per_second"].items():
            what = f"`{row['case'].removesuffix('-cuda')}`, {row['batch']} examples of {row['tokens']} tokens"
            share = f"{row['of_gemm'][route][1]:.0%}"
            lines.append((what, route, f"{rate:,.0f}", _spread(row["units"][route]), share))
    return _grid(header, lines)


def _memory(rows: list[Row]) -> str:
    parts = []
    vocabulary, layers, negatives = (
        sorted((row for row in rows if row["axis"] == axis), key=lambda row: row["size"])
        for axis in ("vocabulary", "layers", "negatives")
    )
    routes = ("forward_mib", "reverse_mib")
    keys = ("peak_mib", "plain_forward_mib", "logits_mib", "weights_mib")
    if vocabulary:
        header = ("vocabulary", "scoring, MiB", "plain forward pass, MiB", "logits alone, MiB", "weights, MiB")
        lines = [(f"{row['size']:,}", *(f"{row[key]:,.0f}" for key in keys)) for row in vocabulary]
        parts.append(_grid(header, lines))
    if layers:
        header = ("layers", "forward route, MiB", "reverse route, MiB", "forward over reverse")
        lines = [
            (f"{row['size']:,}", *(f"{row[key]:,.0f}" for key in routes), f"{row[routes[0]] / row[routes[1]]:.2f}")
            for row in layers
        ]
        parts.append(_grid(header, lines))
    if negatives:
        lines = [(f"{row['size']:,}", f"{row['peak_mib']:,.0f}") for row in negatives]
        parts.append(_grid(("negatives", "scoring to Parquet, MiB"), lines))
    return "\n".join(parts)


def _peer_goals(rows: list[Row], least: float = 1.15) -> str:
    lines: list[tuple[str, str, str, str]] = []
    for workload, group in groupby(sorted(rows, key=lambda row: row["workload"]), key=lambda row: row["workload"]):
        found = {row["case"].removeprefix(f"{workload}-"): row for row in group if not row["error"]}
        ours = [row for name, row in found.items() if name in ("u2a_fast-forward", "u2a_fast-reverse")]
        exact = [row for name, row in found.items() if not name.startswith("u2a_fast") and _is_exact(row)]
        if not (ours and exact):
            continue
        best, rival = min(ours, key=_median_units), min(exact, key=_median_units)
        what = f"`{workload}`: {rival['label']}, the fastest exact peer, over exact u2a_fast"
        lines.append(_goal(what, _median_units(rival) / _median_units(best), least))
        cheap, projected = found.get("u2a_fast-lowrank"), found.get("bergson-16")
        if cheap and projected:
            what = f"`{workload}`: {projected['label']}, over u2a_fast, low-rank direction"
            lines.append(_goal(what, _median_units(projected) / _median_units(cheap), 1))
            what = f"`{workload}`: Spearman of that low rank (that projection: {projected['spearman']['all']:.2f})"
            lines.append(_goal(what, cheap["spearman"]["all"], 0.98))
        if half := found.get("u2a_fast-forward_bf16"):
            what = f"`{workload}`: exact u2a_fast, float32 over bfloat16"
            lines.append(_goal(what, _median_units(best) / _median_units(half), 3))
            what = f"`{workload}`: relative error of that bfloat16 (of the norm)"
            lines.append(_goal(what, half["norm_error"], 0.01, at_most=True))
            lines.append(_goal(f"`{workload}`: its Spearman", half["spearman"]["all"], 0.999))
    return _grid(GOAL_HEADER, lines)


def _is_exact(row: Row) -> bool:
    rounded = row.get("dtype", "float32") != "float32"
    error, bound = (row.get("norm_error", 1.0), 0.06) if rounded else (row.get("relative_error", 1.0), 1e-3)
    return row.get("truth") in ("all", "linears") and error <= bound


def _median_units(row: Row) -> float:
    return row["units"][1]


def _peers(rows: list[Row]) -> str:
    header = (
        "what runs",
        "units",
        "CPU time",
        "examples/s",
        "peak MiB",
        "error",
        "Spearman",
        "of linears",
        "Pearson",
        "lines",
    )
    parts = []
    for workload, group in groupby(sorted(rows, key=lambda row: row["workload"]), key=lambda row: row["workload"]):
        mine = list(group)
        ran = sorted((row for row in mine if not row["error"]), key=_norms_last)
        lines = [_peer(row) for row in ran]
        failed = "".join(f"* {row['label']}{_package(row)}: {row['error']}\n" for row in mine if row["error"])
        size = max(row["judged_examples"] for row in ran)
        title = f"`{workload}`: {ran[0]['parameters'] / 1e6:.1f} M parameters, {size} negatives; {ran[0]['gate']}."
        parts.append(f"{title}\n\n{_grid(header, lines)}" + (f"\nNo result:\n\n{failed}" if failed else ""))
    return "\n".join(parts)


def _peers_device(rows: list[Row]) -> str:
    header = ("what runs", "units", "examples/s", "batch", "device MiB", "error", "Spearman", "of linears", "Pearson")
    parts = []
    for workload, group in groupby(sorted(rows, key=lambda row: row["workload"]), key=lambda row: row["workload"]):
        mine = list(group)
        ran = sorted((row for row in mine if not row["error"]), key=_norms_last)
        failed = "".join(f"* {row['label']}{_package(row)}: {row['error']}\n" for row in mine if row["error"])
        size = max(row["judged_examples"] for row in ran)
        title = f"`{workload}`: {ran[0]['parameters'] / 1e6:,.1f} M parameters, {size} negatives; {ran[0]['gate']}."
        table = _grid(header, [_peer_device(row) for row in ran])
        parts.append(f"{title}\n\n{table}" + (f"\nNo result:\n\n{failed}" if failed else ""))
    return "\n".join(parts)


def _peer_device(row: Row) -> tuple[str, ...]:
    name, units, _, rate, _, _, *agreement, _ = _peer(row)
    batch = "its own" if row["batch"] is None else str(row["batch"])
    error = f"{row['norm_error']:.0e} ({row['truth']})" if "truth" in row else ""
    return name, units, rate, batch, f"{row['device_mib'] or 0:,.0f}", error, *agreement


def _norms_last(row: Row) -> tuple[bool, float]:
    return row.get("truth") == "norms", row["units"][1]


def _package(row: Row) -> str:
    return f" ({row['package'].replace('==', ' ')})" if row["package"] else ""


def _peer(row: Row) -> tuple[str, ...]:
    name = f"**{row['label']}**" if row["label"].startswith("u2a_fast") else f"{row['label']}{_package(row)}"
    agreement = ["", "", "", ""]
    if "spearman" in row:
        spearman = row["spearman"] if row["truth"] != "norms" else {}
        ranks = [f"{spearman[what]:.4f}" if what in spearman else "" for what in ("all", "linears")]
        pearson = f"{row['pearson']['all']:.4f}" if spearman else ""
        agreement = [f"{row['relative_error']:.0e} ({row['truth']})", *ranks, pearson]
    peak = f"{row['peak_mib']:,.0f}" if row["peak_mib"] else ""
    return (
        name,
        _spread(row["units"]),
        f"{row['cpu_units'][1]:.2f}",
        f"{row['examples_per_second']:.2f}",
        peak,
        *agreement,
        str(row["lines"]),
    )


def _crossover(rows: list[Row]) -> str:
    header = ("layer, examples", "K = 4", "K = 8", "K = 16", "product, tokens a token", "tokens a direction")
    lines = [
        (
            f"`{row['case'].removesuffix('-cpu')}`",
            *(f"{row['units'][k]:.2f}" for k in ("4", "8", "16")),
            f"{row['product_tokens']:.2f}",
            f"{row['direction_tokens']:.1f}",
        )
        for row in rows
    ]
    return _grid(header, lines)


def _modes(rows: list[Row]) -> str:
    parts = []
    for row in rows:
        n, listed = row["examples"], row["shortlist"]
        lines = [
            (f"low rank {rank}", f"{found['spearman']:.4f}", f"energy {found['energy']:.2f}")
            for rank, found in row["lowrank"].items()
        ]
        lines += [
            (f"layers, {fraction} of the cost", f"{found['spearman']:.4f}", f"blocks {found['layers']}")
            for fraction, found in row["layers"].items()
        ]
        least, most = listed["recall_interval"]
        recall = f"recall {listed['recall']:.2f} ({least:.2f} to {most:.2f})"
        lines.append(("shortlist", "", f"{listed['rescored'] / n:.0%} scored exactly, {recall}"))
        lines += [
            (f"certified top k, {what}", "1 by proof", f"{share:.0%} scored exactly")
            for what, share in row["certified"].items()
        ]
        lines += [
            (
                f"index, {name}, {found['width']:,} entries a negative",
                f"{found['spearman']:.4f}",
                f"{found['spearman_linear']:.4f} of the linear weights; among the 4 k best of the true top k: "
                + ", ".join(f"{share:.0%} (k = {k})" for k, share in found["recall"].items()),
            )
            for name, found in row.get("index", {}).items()
            if "width" in found
        ]
        parts.append(f"`{row['case']}`, {n} negatives; {row['gate']}.\n\n{_grid(('what', 'Spearman', ''), lines)}")
    return "\n".join(parts)


def _select(benchmark: str, device: str = "cpu") -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for row in rows if (row["benchmark"], row["device"]) == (benchmark, device)]


TABLES: dict[str, tuple[Callable[[list[Row]], list[Row]], Callable[[list[Row]], str]]] = {
    "goals": (
        lambda rows: [
            row
            for row in rows
            if (row["benchmark"], row["case"]) in {goal[0] for goal in GOALS} or _is_one_direction(row)
        ],
        _goals,
    ),
    "routes": (_select("routes"), _routes),
    "score": (_select("score"), _scoring),
    "memory": (_select("memory"), _memory),
    "peers": (_select("peers"), _peers),
    "peer-goals": (_select("peers"), _peer_goals),
    "peer-goals-cuda": (_select("peers", "cuda"), partial(_peer_goals, least=2)),
    "peers-cuda": (_select("peers", "cuda"), _peers_device),
    "modes": (_select("modes"), _modes),
    "crossover": (_select("crossover"), _crossover),
    "throughput": (_select("throughput", "cuda"), _throughput),
    "large": (_select("large", "cuda"), _large),
    "ops-cpu": (_select("ops"), _ops),
    "ops-cuda": (_select("ops", "cuda"), _ops),
}


UNMEASURED = "unmeasured"  # of no machine


def render(text: str, rows: list[Row]) -> str:
    """``text`` with every table as ``rows`` have it. ValueError for a table of no known name."""

    def replace(match: re.Match[str]) -> str:
        if match["name"] == UNMEASURED:
            return f"{match[1]}{_unmeasured(rows)}{match[3]}"
        if match["name"] not in TABLES:
            raise ValueError(f"[tables] expected a table out of {[UNMEASURED, *TABLES]}, got {match['name']!r}")
        select, table = TABLES[match["name"]]
        return f"{match[1]}{_by_machine(select(rows), table)}{match[3]}"

    return BLOCK.sub(replace, text)


def main(argv: Sequence[str] | None = None, *, pages: Sequence[Path] = PAGES, results: Path = RESULTS) -> int:
    """Run the command line; 1 if ``--check`` finds a stale table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is stale")
    check = parser.parse_args(argv).check
    rows = read_rows(results)
    stale = []
    for page in (page for page in pages if page.exists()):
        text = page.read_text(encoding="utf-8")
        fresh = render(text, rows)
        if fresh != text:
            stale.append(page.name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    if check and stale:
        print(f"stale tables in {', '.join(stale)}: run python -m benchmarks.tables")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
