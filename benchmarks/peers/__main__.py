"""Scores the same negatives with u2a_fast and with its peers, each in a process of its own, in alternation.

    python -m benchmarks.peers [--workload hh|llama-19m] [--only NAMES] [--count N] [--rounds 5] [--write]
    python -m benchmarks.peers --device cuda [--workload llama-19m|llama-1b] [--seconds 240] [--wheels FOLDER] [--out F]

Everybody scores all negatives once, which is judged and not timed, then some of them in every round. One unit is a
length-sorted forward pass over the same examples in the same round. Nothing is written unless the exact modes of
u2a_fast agree with float64 autograd in this very run; what cannot be installed, fails or gives scores that it should
not, is a row with its error. Environments are made where they are missing.

With --device contestants come one after another, each in turns with the forward pass on that device, and nothing is
begun after --seconds; rows are written after every contestant. --device cpu does the same on the CPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.peers import on_device
from benchmarks.peers.contestants import CONTESTANTS
from benchmarks.peers.environments import FOLDER, public_error
from benchmarks.peers.measure import GateError, Settings, in_this_version, measure
from benchmarks.peers.task import Task
from benchmarks.rows import results_file
from benchmarks.workloads import Workload, hh, hh_missing, random_examples, random_llama
from u2a_fast.bench.rows import Row, write_rows

WORKLOADS = ("hh", "llama-19m")
COUNTS = {"hh": 200, "llama-19m": 32}
TIMED = {"hh": 48, "llama-19m": 24}
ALWAYS = ("forward", "u2a_fast-reverse")  # the unit and the gate
OTHERS = 8  # examples whose mean answer NLL the direction is the gradient of


def make_task(name: str, count: int | None) -> Task:
    """The workload ``name`` with its first ``count`` negatives."""
    count = count or COUNTS[name]
    if name == "hh":
        workload = hh(count)
    else:
        sizes = {"tokens": 128, "vocabulary": 16000}
        model = random_llama(hidden=384, layers=8, ffn=1024, heads=6, kv_heads=2, vocabulary=16000)
        examples, others = (random_examples(n, seed=s, **sizes) for n, s in ((count, 1), (OTHERS, 2)))
        workload = Workload(name, model, examples, others)
    workload = replace(workload, others=workload.others[:OTHERS])
    return Task(workload.model, workload.examples, workload.others, workload.direction())


def _report(row: Row) -> None:
    name = row["case"]
    if row["error"]:
        print(f"  {name:<28} {row['error']}", flush=True)
        return
    agreement = ", ".join(f"{what} {value:.4f}" for what, value in row.get("spearman", {}).items())
    p20, p50, p80 = row["units"]
    peak = row["device_mib"] if row["device"] == "cuda" else row["peak_mib"]
    cpu, rate = row["cpu_units"][1], row["examples_per_second"]
    error = f"error {row['relative_error']:.1e}, of norm {row['norm_error']:.1e}, " if "relative_error" in row else ""
    print(
        f"  {name:<28} {p50:6.2f} units ({p20:.2f} to {p80:.2f}; CPU {cpu:.2f}), {rate:8.2f}/s, "
        f"{peak or 0:6.0f} MiB, {error}Spearman: {agreement or '-'}, {row['lines']} lines",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted({*WORKLOADS, *on_device.WORKLOADS}))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="one after another on this device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the model, with --device")
    parser.add_argument("--seconds", type=float, help="begin nothing after so many, with --device")
    parser.add_argument("--wheels", type=Path, help="install peers from this folder alone, with --device")
    parser.add_argument("--only", help=f"names of contestants, separated by commas; {' and '.join(ALWAYS)} run anyway")
    parser.add_argument("--count", type=int, help=f"negatives to score (default: {COUNTS})")
    parser.add_argument("--timed", type=int, help=f"negatives of each timed run (default: {TIMED})")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs, after one over all negatives")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, help="seconds that one run may take: 600, with --device 60")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where environments, tasks and logs go")
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    parser.add_argument("--write", action="store_true", help="merge them into the committed ones and write the tables")
    return parser


def _keep(options: argparse.Namespace, rows: list[Row]) -> None:
    """Merge rows into the files that the options name."""
    for path in [options.out] * bool(options.out) + [results_file(rows[0])] * options.write:
        write_rows(path, rows)


def _device_rows(options: argparse.Namespace, name: str, limits: on_device.Limits) -> bool:
    """Measure one workload on the device; False if its gate failed."""
    sizes = on_device.WORKLOADS[name]
    dtype = options.dtype or sizes.dtype
    only = options.only.split(",") if options.only else None
    print(f"{name}, {options.device}, {dtype}: {limits.left():.0f} s", flush=True)
    try:
        on_device.measure_on_device(
            name,
            on_device.make_task(sizes, options.device, dtype, options.count),
            on_device.entrants(dtype, only),
            limits,
            folder=options.folder.resolve(),
            reference=getattr(torch, sizes.reference),
            wheels=options.wheels.resolve() if options.wheels else None,
            report=_report,
            save=lambda rows: _keep(options, rows),
        )
    except GateError as error:
        print(f"GATE FAILED, nothing written: {error}", flush=True)
        return False
    except (RuntimeError, ValueError, OSError) as error:  # out of memory, say: the other workload still has its turn
        print(f"FAILED: {type(error).__name__}: {public_error(str(error))}", flush=True)
        return False
    return True


def _on_device(options: argparse.Namespace) -> int:
    """Every workload within its share of what time is left."""
    end = time.monotonic() + (options.seconds or float("inf"))
    names = [options.workload] if options.workload else list(on_device.WORKLOADS)
    passed = []
    for number, name in enumerate(names):
        now = time.monotonic()
        until = now + (end - now) / (len(names) - number)
        limits = on_device.Limits(options.rounds, options.threads, options.patience or 60, until=until)
        passed.append(_device_rows(options, name, limits))
    if options.write:
        tables.main([])
    return int(not all(passed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a gate failed."""
    parser = _parser()
    options = parser.parse_args(argv)
    workloads = on_device.WORKLOADS if options.device else WORKLOADS
    if options.workload and options.workload not in workloads:
        parser.error(f"expected a workload out of {', '.join(workloads)}, got {options.workload}")
    names = [contestant.name for contestant in CONTESTANTS]
    chosen = options.only.split(",") if options.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"expected names out of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    contestants = [c for c in CONTESTANTS if c.name in {*ALWAYS, *chosen}]
    if absent := [c.name for c in contestants if not in_this_version(c)]:
        print(f"not in this version of u2a_fast: {', '.join(absent)}")
    torch.set_num_threads(options.threads)
    if options.device:
        return _on_device(options)
    failed = False
    for name in [options.workload] if options.workload else WORKLOADS:
        if name == "hh" and (reason := hh_missing()):
            print(f"hh: skipped, {reason}")
            continue
        task = make_task(name, options.count)
        timed = min(len(task.examples), options.timed or TIMED[name])
        settings = Settings(options.folder.resolve(), options.rounds, timed, options.threads, options.patience or 600)
        print(f"{name}: {len(task.examples)} negatives, {timed} of them timed", flush=True)
        try:
            rows = measure(name, task, contestants, settings)
        except GateError as error:
            print(f"GATE FAILED, nothing written: {error}", flush=True)
            failed = True
            continue
        for row in rows:
            _report(row)
        _keep(options, rows)
    if options.write:
        tables.main([])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
