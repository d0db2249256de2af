"""Scoring by the default route and by low rank, against a forward pass and against the public U2A procedure.

    python -m benchmarks.score [--only llama|hh] [--count N] [--rounds N] [--threads 1] [--out rows.jsonl]

Contestants take turns on the same block of examples (a batch of 2048 tokens, as the scorer plans it), block by block in
one process; ratios are of the totals, with the spread over blocks. The gate: float32 scores, the public procedure's
included, agree with per-example autograd in float64 to 1e-4; bfloat16, where it ranks otherwise than float32 (Spearman
correlation below 0.995), is not timed. Setting up, paid once however many negatives follow, is reported apart.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/score.py`

from benchmarks.baselines import (
    GateError,
    PublicProcedure,
    float64_scores,
    forward_answer_head,
    forward_full_head,
    score_error,
)
from benchmarks.workloads import HH_TOKENS, Workload, hh, hh_missing, llama
from u2a_fast.bench.machine import has_cpu_flag
from u2a_fast.bench.rows import Row, make_row, write_rows
from u2a_fast.bench.timing import in_turns, once, ratios
from u2a_fast.data.packing import Example, batched
from u2a_fast.influence.routes import make_pass
from u2a_fast.models.decoder import Decoder
from u2a_fast.statistics import spearman

__all__ = ["GateError", "main", "measure"]

TOKEN_BUDGET = 2048
# Float32 scores, relative to each exact score, or to the median magnitude of the exact scores where one is smaller: a
# score near zero is a difference of large terms, and its own digits say nothing about the ranking.
AGREEMENT = 1e-4
RANKING = 0.995  # bfloat16 scores, Spearman against float32
OURS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    **{f"lowrank{rank}": {"mode": "lowrank", "rank": rank} for rank in (16, 32, 64)},
}
CHECKED = 16  # examples whose scores are compared with autograd in float64, which takes twice as long as float32

Contestant = Callable[[Sequence[Example]], Any]


def _contestants(
    workload: Workload, direction: dict[str, Tensor], public: bool, stack: ExitStack
) -> tuple[dict[str, Contestant], dict[str, float]]:
    """Contestants by name, and the seconds that u2a_fast's take to set up."""
    # Each works on a model of its own: the procedure needs gradients of weights, bfloat16 other weights.
    setup: dict[str, float] = {}
    contestants: dict[str, Contestant] = {}
    for name, options in OURS.items():
        model = copy.deepcopy(workload.model)

        def prepare(model: Any = model, options: dict[str, Any] = options, name: str = name) -> None:
            passes, _ = make_pass(model, [direction], **options)
            stack.enter_context(passes.running())
            contestants[name] = lambda examples: passes(examples).derivatives[0]

        setup[name] = once(prepare)
    together = contestants["fp32"]
    contestants["batch_invariant"] = lambda examples: torch.cat([together([example]) for example in examples])
    decoder = Decoder(copy.deepcopy(workload.model))
    contestants["forward"] = lambda examples: forward_full_head(decoder, examples)
    contestants["forward_answer"] = lambda examples: forward_answer_head(decoder, examples)
    if public:
        contestants["public_padded"] = PublicProcedure(workload.model, direction, padded=HH_TOKENS)
        contestants["public"] = PublicProcedure(workload.model, direction)
    return contestants, setup


def _gate(workload: Workload, direction: dict[str, Tensor], contestants: dict[str, Contestant]) -> dict[str, float]:
    """What the scores are worth; GateError where those of float32 are wrong."""
    scores = {name: torch.empty(len(workload.examples), dtype=torch.float64) for name in OURS}
    for positions, batch in batched(workload.examples, TOKEN_BUDGET):
        for name, found in scores.items():
            found[positions] = contestants[name](batch).double()
    checked = workload.examples[:CHECKED]
    exact = float64_scores(workload.model, direction, checked)
    errors = {"fp32": score_error(scores["fp32"][: len(checked)], exact)}
    others = [name for name in contestants if name.startswith("public") or name == "batch_invariant"]
    errors |= {name: score_error(contestants[name](checked), exact) for name in others}
    for name, error in errors.items():
        if not error <= AGREEMENT:
            raise GateError(f"{workload.name}: {name} scores differ from float64 autograd by {error:.1e} (relative)")
    ranking = {name: spearman(found.numpy(), scores["fp32"].numpy()) for name, found in scores.items()}
    return {
        "relative_error": errors["fp32"],
        "spearman_bf16": ranking["bf16"],
        "spearman": ranking,
        "checked": len(checked),
    }


def measure(workload: Workload, *, rounds: int, public: bool) -> Row:
    """One row: totals, units of a forward pass and, with ``public``, rates against the public procedure."""
    with ExitStack() as stack:
        direction = workload.direction()
        contestants, setup = _contestants(workload, direction, public, stack)
        judged = _gate(workload, direction, contestants)
        if not judged["spearman_bf16"] >= RANKING:
            del contestants["bf16"]
        blocks = [batch for _, batch in batched(workload.examples, TOKEN_BUDGET)]
        times = in_turns(contestants, blocks, rounds=rounds)
    gate = (
        f"float32 scores of {judged['checked']} examples within {judged['relative_error']:.1e} (relative) of "
        f"float64 autograd; Spearman of bfloat16 against float32 {judged['spearman_bf16']:.5f}"
    )
    return make_row("score", workload.name, _values(workload, times, setup, rounds) | judged, gate=gate)


def _values(workload: Workload, times: dict[str, list[float]], setup: dict[str, float], rounds: int) -> dict[str, Any]:
    total = {name: sum(samples) for name, samples in times.items()}
    parameters = sum(p.numel() for p in workload.model.parameters())
    tokens = sum(len(example["input_ids"]) - 1 for example in workload.examples)
    unit = sum(times["forward"]) / rounds
    values: dict[str, Any] = {
        "parameters": parameters,
        "examples": len(workload.examples),
        "tokens": tokens,
        "rounds": rounds,
        "blocks": len(times["forward"]) // rounds,
        "avx512_bf16": has_cpu_flag("avx512_bf16"),
        "forward_seconds": unit,
        "forward_gflops": 2 * parameters * tokens / unit / 1e9,
        "examples_per_second": {n: rounds * len(workload.examples) / t for n, t in total.items()},
        "units": {n: t / total["forward"] for n, t in total.items()},
        "units_spread": {n: ratios(s, times["forward"]).to_list() for n, s in times.items()},
        "setup_units": {n: seconds / unit for n, seconds in setup.items()},
    }
    values["speedup"] = {
        f"{fast} over {slow}": {"total": total[slow] / total[fast], "spread": _ratio(times, slow, fast)}
        for fast in ("fp32", "bf16")
        for slow in ("public_padded", "public", "fp32")
        if fast != slow and fast in total and slow in total
    }
    return values


def _ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> list[float]:
    return ratios(times[numerator], times[denominator]).to_list()


def _report(row: Row) -> None:
    print(
        f"{row['case']}: {row['examples']} examples, {row['tokens']} tokens, {row['parameters'] / 1e6:.1f} M parameters"
    )
    print(f"  gate: {row['gate']}{'' if 'bf16' in row['units'] else ': BFLOAT16 FAILED, not timed'}")
    for name, units in row["units"].items():
        p20, p50, p80 = row["units_spread"][name]
        rate = row["examples_per_second"][name]
        ranked = f", Spearman {row['spearman'][name]:.4f}" if name.startswith("lowrank") else ""
        spread = f"blocks: {p20:.2f} / {p50:.2f} / {p80:.2f}"
        print(f"  {name:<15} {units:6.2f} units ({spread}), {rate:8.2f} examples/s{ranked}")
    for name, ratio in row["speedup"].items():
        p20, p50, p80 = ratio["spread"]
        print(f"  {name:<24} {ratio['total']:5.2f} x (blocks: {p20:.2f} / {p50:.2f} / {p80:.2f})")
    print(f"  set up once: {', '.join(f'{n} {u:.2f} units' for n, u in row['setup_units'].items())}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a gate failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("llama", "hh"))
    parser.add_argument("--count", type=int, help="examples to score (default: llama 64, hh 200)")
    parser.add_argument("--rounds", type=int, help="times that every block is scored (default: llama 2, hh 1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    size = {} if options.count is None else {"count": options.count}
    failed = 0
    for name, make, rounds in (("llama", llama, 2), ("hh", hh, 1)):
        if options.only not in (None, name):
            continue
        if name == "hh" and (reason := hh_missing()):
            print(f"hh: skipped, {reason}")
            continue
        try:
            row = measure(make(**size), rounds=options.rounds or rounds, public=name == "hh")
        except GateError as error:
            failed += 1
            print(f"GATE FAILED, not timed: {error}", flush=True)
            continue
        _report(row)
        failed += "bf16" not in row["units"]
        if options.out:
            write_rows(options.out, [row])
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
