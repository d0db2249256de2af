"""What the approximate modes lose and what a certificate costs, on the HH negatives: counts, no times.

    python -m benchmarks.modes [--count N] [--out rows.jsonl]

The direction is the gradient of the mean answer NLL of 64 positives. For every rank: Spearman against exact scores,
the energy kept, and the share of the negatives that a certified top k scores exactly, k being 1 % and 10 % of them;
``planned`` is the share with ranks planned by cost. For ``layers`` the Spearman by the fraction of the cost. For
``index``, by projection at about as many entries a negative: Spearman against exact scores and against those of the
linear weights alone, which is all that an index holds (``linear``: of these against exact scores), the share of the
direction's squared norm that it sees, and the share of the true top k among the 4 k best estimates.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import Workload, hh, hh_missing
from u2a_fast import SFT, GradientIndex, InfluenceScorer, directional_derivatives
from u2a_fast.bench.rows import Row, make_row, write_rows
from u2a_fast.influence.derivatives import DerivativePass
from u2a_fast.influence.lowrank import linear_weights, truncate
from u2a_fast.influence.routes import run_batches
from u2a_fast.influence.scorer import Scores
from u2a_fast.influence.topk import best, certify
from u2a_fast.models.decoder import Decoder
from u2a_fast.models.memory import Room
from u2a_fast.sketch import MAX_DIM
from u2a_fast.statistics import spearman

__all__ = ["main", "measure"]

RANKS = (16, 32, 64, 128)
INDEX_SIDE = 16  # k: two-sided projections keep k^2 entries of every layer


class GateError(RuntimeError):
    """A certified top k is not the top k."""


def measure(workload: Workload, *, ranks: Sequence[int] = RANKS) -> Row:
    """One row of counts; GateError where a certificate lies."""
    objective = SFT([{"example": e} for e in workload.others])
    make = partial(InfluenceScorer, workload.model, None, objective, parameters="all")
    scorer = make()
    exact = scorer.score(workload.examples)
    n = len(exact)
    values: dict[str, Any] = {"examples": n, "lowrank": {}, "layers": {}, "certified": {}}
    ks = sorted({max(1, n // 100), max(1, n // 10)})
    for rank in ranks:
        found = make(mode="lowrank", rank=rank).score(workload.examples)
        values["lowrank"][rank] = {"spearman": spearman(found.score, exact.score), "energy": _report(found)["energy"]}
        rescored = _rescored(scorer, workload, exact, rank, ks)
        values["certified"] |= {f"rank {rank}, k = {k}": share for k, share in rescored.items()}
    for k in ks:
        top = scorer.topk(workload.examples, k)
        if not np.allclose(top.score, exact.score[best(exact.score, k)], rtol=1e-3, atol=1e-4):
            raise GateError(f"the certified top {k} is not the top {k}")
        values["certified"][f"planned, k = {k}"] = _report(top)["rescored"] / n
    for fraction in (0.25, 0.5, 0.75):
        found = make(mode="layers", fraction=fraction).score(workload.examples)
        chosen = list(_report(found)["layers"])
        values["layers"][fraction] = {"spearman": spearman(found.score, exact.score), "layers": chosen}
    found = make(mode="shortlist", rank=ranks[0], fraction=0.2).score(workload.examples)
    values["shortlist"] = {name: _report(found)[name] for name in ("rescored", "recall", "recall_interval")}
    values["index"] = _index(scorer, workload, exact, ks)
    return make_row("modes", workload.name, values, gate="every certified top k is the top k by exact score")


def _rescored(
    scorer: InfluenceScorer, workload: Workload, exact: Scores, rank: int, ks: Sequence[int]
) -> dict[int, float]:
    """Share of the negatives that must be rescored for the top k, by k."""
    approximate = partial(truncate, ranks=rank, bounded=True)
    passes = DerivativePass(workload.model, [scorer.direction()], approximate=approximate)
    score, bound = np.zeros((2, len(exact)))
    with passes.running():
        for at, out in run_batches(passes, workload.examples, Room(scorer.token_budget)):
            assert out.bound is not None
            score[at], bound[at] = -out.derivatives[0].double().numpy(), out.bound[0].numpy()
    if not (np.abs(score - exact.score) <= bound).all():
        raise GateError(f"a bound of rank {rank} does not hold")
    return {k: certify(score, bound, lambda p: exact.score[p], k)[1].count() / len(exact) for k in ks}


def _index(scorer: InfluenceScorer, workload: Workload, exact: Scores, ks: Sequence[int]) -> dict[str, Any]:
    """Spearman, coverage and recall by projection; the sketch last, as wide as the others or as it can be."""
    downhill = {name: -v for name, v in scorer.direction().items()}
    decoder = Decoder(workload.model)
    decoder.materialize_head()
    held = {name: downhill[name] for name in linear_weights(decoder)}
    linear = directional_derivatives(workload.model, workload.examples, held).numpy()
    found: dict[str, Any] = {"linear": {"spearman": spearman(linear, exact.score)}}
    width = MAX_DIM
    for projection in ("pca", "random", "identity", "sketch"):
        dim = min(width, MAX_DIM) if projection == "sketch" else INDEX_SIDE**2
        with tempfile.TemporaryDirectory() as folder:
            index = GradientIndex.build(
                workload.model, workload.examples, folder, projection=projection, dim=dim, parameters="all"
            )
            estimates, width = index.scores(downhill), index.shards.manifest["width"]
            found[projection] = {
                "width": width,
                "spearman": spearman(estimates, exact.score),
                "spearman_linear": spearman(estimates, linear),
                "coverage": index.coverage(downhill),
                "recall": {k: _recall(estimates, exact.score, k) for k in ks},
            }
    return found


def _recall(estimates: np.ndarray, exact: np.ndarray, k: int) -> float:
    """Share of the true top k among the 4 k best estimates."""
    return len(set(best(exact, k).tolist()) & set(best(estimates, 4 * k).tolist())) / k


def _report(scores: Scores) -> dict[str, Any]:
    assert scores.report is not None
    return scores.report.to_dict()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a certificate lied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--out", type=Path, help="merge the row into this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if reason := hh_missing():
        print(f"hh: skipped, {reason}")
        return 0
    try:
        row = measure(hh(options.count))
    except GateError as error:
        print(f"GATE FAILED: {error}")
        return 1
    for name in ("lowrank", "layers", "shortlist", "certified", "index"):
        for case, value in row[name].items():
            print(f"{name:<10} {case}: {value}", flush=True)
    if options.out:
        write_rows(options.out, [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
