"""Peak memory of scoring, beyond weights and directions, as vocabulary, layers or the number of negatives grow.

    python -m benchmarks.memory [--only vocabulary|layers|negatives] [--sizes 4000,32000,128000] [--out rows.jsonl]

Every point runs in a process of its own. Once model, directions and libraries are in memory (a short example has been
scored), the kernel's high-water mark of the resident set is reset; what it has risen by when scoring ends is the peak.
Linux only: it takes /proc/self/clear_refs. The gate: scores agree with float64 autograd (vocabulary, layers), and
the file holds every negative and the scores of a direct call (negatives).
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/memory.py`

from benchmarks import ROOT
from benchmarks.baselines import float64_scores, forward_full_head, score_error
from benchmarks.workloads import TokenExample, Workload, llama, random_examples, random_llama
from u2a_fast.bench.rows import Row, make_row, write_rows
from u2a_fast.data.packing import batched
from u2a_fast.influence.derivatives import DerivativePass
from u2a_fast.influence.forward import ForwardPass
from u2a_fast.influence.objectives import SFT
from u2a_fast.influence.scorer import InfluenceScorer
from u2a_fast.models.decoder import Decoder
from u2a_fast.store import read_scores, score_to_parquet

__all__ = ["main", "point"]

SIZES = {"vocabulary": (4_000, 32_000, 128_000), "layers": (4, 8, 16, 32), "negatives": (1_000, 10_000)}
TOKEN_BUDGET = 2048
AGREEMENT = 1e-4
TINY_VOCABULARY = 256
WINDOW = 512  # negatives that the store holds at a time
MIB = 1 << 20


def _status(field: str) -> int:
    """Bytes of a field of this process's memory status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peak(task: Callable[[], object]) -> int:
    """Bytes by which the resident set rises above its present size while ``task`` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory still held by the allocator would hide as much of the rise
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    task()
    return _status("VmHWM") - before


def _vocabulary_point(size: int) -> dict[str, Any]:
    """Scoring of 16 examples of 128 tokens, width 128: the peak of a batch and of a plain forward pass over it."""
    workload = llama(16, hidden=128, layers=2, ffn=256, heads=2, vocabulary=size)
    direction = workload.direction()
    passes, decoder = DerivativePass(workload.model, [direction]), Decoder(workload.model)
    batches = [batch for _, batch in batched(workload.examples, TOKEN_BUDGET)]
    found: list[torch.Tensor] = []
    with passes.running():
        passes(workload.examples[:1])
        scoring = _peak(lambda: found.extend(passes(batch).derivatives[0] for batch in batches))
    plain = _peak(lambda: [forward_full_head(decoder, batch) for batch in batches])
    error = _disagreement(workload, direction, torch.cat(found)[:4])
    tokens = sum(len(example["input_ids"]) - 1 for example in workload.examples)
    return {
        "size": size,
        "peak_mib": scoring / MIB,
        "plain_forward_mib": plain / MIB,
        "logits_mib": tokens * size * 4 / MIB,
        "weights_mib": sum(p.nbytes for p in workload.model.parameters()) / MIB,
        "passed": error <= AGREEMENT,
        "gate": f"scores of 4 examples within {error:.1e} (relative) of float64 autograd",
    }


def _layers_point(size: int) -> dict[str, Any]:
    """One batch of 16 examples of 128 tokens, width 256: the peaks of the forward and of the reverse route."""
    workload = llama(16, hidden=256, layers=size, ffn=768, heads=4, vocabulary=4000)
    direction = workload.direction()
    peaks, errors = {}, []
    for name, route in (("forward", ForwardPass), ("reverse", DerivativePass)):
        passes = route(workload.model, [direction])
        found: list[torch.Tensor] = []
        with passes.running():
            passes(workload.examples[:1])
            peak = _peak(lambda p=passes, out=found: out.append(p(workload.examples).derivatives[0]))
        peaks[f"{name}_mib"] = peak / MIB
        errors.append(_disagreement(workload, direction, found[0][:2]))
    return {
        "size": size,
        **peaks,
        "passed": max(errors) <= AGREEMENT,
        "gate": f"scores of 2 examples within {max(errors):.1e} (relative) of float64 autograd",
    }


def _disagreement(workload: Workload, direction: dict[str, torch.Tensor], scores: torch.Tensor) -> float:
    return score_error(scores, float64_scores(workload.model, direction, workload.examples[: len(scores)]))


def _stream(count: int) -> Iterator[dict[str, Any]]:
    """Negatives of 8 to 63 tokens, made as they are asked for, so that they take no memory of their own."""
    for i in range(count):
        example: TokenExample = random_examples(1, tokens=8 + i * 37 % 56, vocabulary=TINY_VOCABULARY, seed=i)[0]
        yield {"id": str(i), **example}


def _negatives_point(size: int) -> dict[str, Any]:
    """Scoring of a stream into Parquet, as ``u2a-fast score`` does it, by a model of one narrow layer."""
    model = random_llama(hidden=32, layers=1, ffn=64, heads=2, vocabulary=TINY_VOCABULARY)
    rows = [{"example": example} for example in random_examples(8, tokens=32, vocabulary=TINY_VOCABULARY, seed=0)]
    scorer = InfluenceScorer(model, None, SFT(rows), token_budget=TOKEN_BUDGET)
    with tempfile.TemporaryDirectory() as folder:
        score_to_parquet(scorer, _stream(WINDOW), Path(folder) / "warm", window=WINDOW)
        peak = _peak(lambda: score_to_parquet(scorer, _stream(size), Path(folder) / "out", window=WINDOW))
        stored = read_scores(Path(folder) / "out")
    direct = scorer.score(list(_stream(min(WINDOW, size))))
    same = np.array_equal(stored["score"][: len(direct)], direct.score)
    complete = stored["id"].tolist() == [str(i) for i in range(size)]
    return {
        "size": size,
        "peak_mib": peak / MIB,
        "passed": bool(same and complete),
        "gate": f"the file holds all {size} negatives in order; the first {len(direct)} scores are a direct call's",
    }


POINTS = {"vocabulary": _vocabulary_point, "layers": _layers_point, "negatives": _negatives_point}


def point(axis: str, size: int) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--point", axis, "--sizes", str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"[memory] {axis} {size} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(axis: str, found: dict[str, Any]) -> Row:
    values = {"axis": axis, **{key: value for key, value in found.items() if key not in ("passed", "gate")}}
    return make_row("memory", f"{axis}-{found['size']}", values, gate=found["gate"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a gate failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SIZES))
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), help="sizes along the axis")
    parser.add_argument("--point", choices=tuple(SIZES), help="measure one size in this process and print it as JSON")
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.point:
        print(json.dumps(POINTS[options.point](options.sizes[0])))
        return 0
    failed = 0
    for axis in (options.only,) if options.only else tuple(SIZES):
        for size in options.sizes or SIZES[axis]:
            found = point(axis, size)
            failed += not found["passed"]
            verdict = "" if found["passed"] else "GATE FAILED: "
            extra = ", ".join(f"{k} {v:.1f}" for k, v in found.items() if k.endswith("_mib"))
            print(f"{axis} {size}: {extra} ({verdict}{found['gate']})", flush=True)
            if found["passed"] and options.out:
                write_rows(options.out, [_row(axis, found)])
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
