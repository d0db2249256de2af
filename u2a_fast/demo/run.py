"""The demo from end to end: corpus, model, scores, selection, loop, evaluation, the experiment over seeds, report."""

import copy
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from u2a_fast.demo.claims import claims, seed_rows, summary
from u2a_fast.demo.corpus import CorpusSize
from u2a_fast.demo.experiment import Lab, Settings, choose, harm_auc, prepare, realized_gains, run_arms
from u2a_fast.evaluation import evaluate
from u2a_fast.influence.objectives import DPO
from u2a_fast.influence.scorer import InfluenceScorer, Scores
from u2a_fast.influence.signal import signal_check
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import resolve_device
from u2a_fast.report import write_report
from u2a_fast.statistics import spearman
from u2a_fast.store import read_scores, score_to_parquet, sha256_of_files, write_selection, write_text
from u2a_fast.unlearning import AlignConfig, align, unlearn

__all__ = ["FAST", "SEEDS", "run"]

SEEDS = tuple(range(10, 20))  # none of them was run before the settings were fixed
FAST = Settings(
    size=CorpusSize(harmful=120, mislabeled=80, duplicates=40, positives=200, preferences=96, heldout=48),
    steps=24,
    look_every=12,
    rounds=2,
    realized_sample=4,
)

_DESCRIPTION = [
    "A tiny language model was trained on good and bad answers of a synthetic corpus whose truth is known. Among its "
    "negatives are harmless answers filed there by mistake, and duplicates. Every seed has its own corpus, model and "
    "random choices, and every arm starts from the same model, with the same number of steps at the same rate.",
    "Arms: u2a unlearns the top third by score with exponentiated-gradient weights; uniform all negatives, random "
    "and bottom a third, with equal weights. Held-out preference pairs are about prompts that neither scores nor "
    "training have seen. The dashed line is the loss before unlearning.",
]


class _Log:
    """Lines with the time since the start, on stderr, so that stdout stays the caller's."""

    def __init__(self) -> None:
        self.console, self.start = Console(stderr=True), time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def __call__(self, text: str) -> None:
        self.console.print(f"[{self.seconds:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(name, justify="left" if name == header[0] else "right")
        for row in rows:
            table.add_row(*(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row))
        self.console.print(table)


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Exempt what is alive from garbage collection: accelerate runs a full one after every training, 0.4 s each."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A single thread: tensors this small lose by sharing, and figures then do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _recorded(command: str, lab: Lab, out: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """run.yaml beside a result, as the verb of that name would write it; the block fills in the result."""
    used = {"negatives": str(lab.paths["negatives"].absolute()), "seed": lab.seed, **options}
    device = str(next(lab.model.parameters()).device)
    hashes = sha256_of_files(lab.paths.values())
    record, result = RunRecord.start(command, used, out, device=device, hashes=hashes), dict[str, Any]()
    yield result
    record.finish(result)


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _main_job(lab: Lab, settings: Settings, out: Path, log: _Log) -> float:
    """Signal check, score, select, realized gains, loop and evaluation of one seed, each with its files below ``out``.

    Returns the Spearman correlation of predicted and realized gains.
    """
    preferences = {"preferences": str(lab.paths["preferences"].absolute())}
    scorer = InfluenceScorer(lab.model, lab.tokenizer, DPO(lab.preferences), settings.curvature)
    with _recorded("score", lab, out / "score", curvature=settings.curvature, **preferences) as result:
        signal = signal_check(scorer, lab.negatives, seed=lab.seed)
        write_text(out / "score" / "signal.json", json.dumps(signal.to_dict(), indent=2))
        scorer.reset()
        written = score_to_parquet(scorer, lab.negatives, out / "score")
        write_text(out / "score" / "skipped.jsonl", "")
        result |= {"rows": written.rows, "nonfinite": written.nonfinite}
    log(f"signal check: cosine of gradient halves {signal.cosine:.3f}, Spearman of their scores {signal.spearman:.3f}")
    scores = Scores.from_columns(read_scores(out / "score"))
    selection = choose(scores, settings)
    with _recorded("select", lab, out / "select", strategy="top-k", k=len(selection), weights="eg"):
        write_selection(out / "select" / "selection.parquet", selection)
    log(f"scored {len(scores)} negatives: AUC {harm_auc(scores.score, lab.kinds):.3f}; selected {len(selection)}, "
        f"effective sample size {selection.effective_sample_size:.0f}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        realized = realized_gains(lab, scores, settings, Path(folder))
    write_text(out / "realized.jsonl", _lines(realized))
    rank = spearman(np.array([r["predicted"] for r in realized]), np.array([r["realized"] for r in realized]))
    log(f"predicted against realized gain of {len(realized)} negatives unlearned alone: Spearman {rank:.3f}")
    _unlearn_once(lab, selection.index, selection.weight, settings, out / "unlearn")
    _loop(lab, settings, len(selection), out, log)
    return rank


def _unlearn_once(lab: Lab, index: np.ndarray, weight: np.ndarray, settings: Settings, out: Path) -> None:
    config = replace(settings.unlearning(lab.seed), max_drift=1.0)
    with _recorded("unlearn", lab, out, **asdict(config)) as result:
        done = unlearn(
            copy.deepcopy(lab.model),
            lab.tokenizer,
            [lab.negatives[i] for i in index],
            weight.tolist(),
            config=config,
            output_dir=out,
        )
        result |= {"steps": done.steps, "drift": done.drift}


def _loop(lab: Lab, settings: Settings, k: int, out: Path, log: _Log) -> None:
    """The loop on the same model, and the evaluation of what it ends with, on pairs that the loop has not seen."""
    config = AlignConfig(
        rounds=settings.rounds,
        unlearn=replace(settings.unlearning(lab.seed), loss="graddiff", max_drift=1.0),
        k=k,
        curvature=settings.curvature,
        seed=lab.seed,
    )
    model = copy.deepcopy(lab.model)
    with _recorded("align", lab, out / "align", **asdict(config)) as result:
        done = align(
            model,
            lab.tokenizer,
            lab.negatives,
            DPO(lab.preferences),
            config=config,
            retain=lab.positives,
            output_dir=out / "align",
        )
        result |= {"best_round": done.best_round, "stopped": done.stopped}
    with _recorded("evaluate", lab, out / "evaluate", model=str((out / "align" / "model").absolute())) as result:
        sets = {"preferences": lab.heldout, "negatives": lab.negatives, "positives": lab.positives}
        metrics = evaluate(model, lab.tokenizer, **sets, reference=lab.model, seed=lab.seed)  # type: ignore[arg-type]
        write_text(out / "evaluate" / "metrics.json", json.dumps(metrics, indent=2))
        result |= metrics
    after = metrics["preference"]
    log(f"loop: {len(done.rounds)} rounds ({done.stopped}); held-out loss {after['loss']:.3f} from {np.log(2):.3f}, "
        f"reward accuracy {after['reward_accuracy']:.2f}")  # fmt: skip


def _experiment(seeds: Sequence[int], settings: Settings, device: torch.device, log: _Log) -> list[dict[str, Any]]:
    """Every arm in every seed; models and corpora are thrown away, their rows stay."""
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            lab = prepare(seed, folder / "corpus", settings, device)
            own = run_arms(lab, settings, folder / "arms")
        rows += own
        losses = ", ".join(f"{row['arm']} {row['heldout_loss']:.3f}" for row in own)
        log(f"seed {seed}: AUC {own[0][f'auc_{settings.curvature}']:.3f}; held-out loss {losses}")
    return rows


def run(
    out_dir: Path | str,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    fast: bool = False,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Run the demo.

    Args:
        out_dir: gets ``corpus/``, ``model/``, ``score/``, ``select/``, ``unlearn/``, ``align/``, ``evaluate/``, as the
            verbs write them; ``rows.jsonl`` (one row a seed and arm), ``realized.jsonl``, ``demo.json``,
            ``report.html``. A former run is replaced.
        seed: of the corpus and model that those folders are about.
        seeds: of the comparison of arms; None: ten that no setting was chosen on (two with ``fast``).
        fast: a smaller corpus and fewer steps, for tests.
        device: None: CUDA where there is one, else the CPU.

    Returns:
        A mapping that JSON can hold: ``claims`` (each with ``name``, ``text``, ``holds``), ``all_hold``, ``spearman``,
        ``summary``, ``seconds`` and ``report``, the page's path.
    """
    log, out, place = _Log(), Path(out_dir), resolve_device(device)
    settings = FAST if fast else Settings()
    chosen = list(seeds) if seeds is not None else list(SEEDS[:2] if fast else SEEDS)
    for part in ("corpus", "model", "score", "select", "unlearn", "align", "evaluate"):
        shutil.rmtree(out / part, ignore_errors=True)
    with _one_thread(), _frozen_heap():
        lab = prepare(seed, out / "corpus", settings, place)
        lab.model.save_pretrained(out / "model")
        lab.tokenizer.save_pretrained(out / "model")
        log(f"trained a model of {lab.model.num_parameters():,} parameters to {lab.training_nll:.2f} nats a token")
        rank = _main_job(lab, settings, out, log)
        rows = _experiment(chosen, settings, place, log)
    judged = claims(rows, settings.curvature, rank)
    content: dict[str, Any] = {
        "description": _DESCRIPTION,
        "claims": judged,
        "summary": summary(rows),
        "seeds": {
            "held-out loss at matched steps, seed by seed": seed_rows(rows, "heldout_loss"),
            "held-out loss at matched forgetting, seed by seed": seed_rows(rows, "matched_loss"),
        },
        "before": float(np.log(2)),
        "settings": asdict(settings),
        "spearman": rank,
        "rows": rows,
    }
    write_text(out / "rows.jsonl", _lines(rows))
    write_text(out / "demo.json", json.dumps(content, indent=2))
    page = write_report(out)
    log.table("Means over seeds", content["summary"]["header"], content["summary"]["rows"])
    for claim in judged:
        log(f"{'holds' if claim['holds'] else 'FAILS'}: {claim['text']}")
    log(f"report: {page.absolute()}")
    return {
        "claims": judged,
        "all_hold": all(claim["holds"] for claim in judged),
        "spearman": rank,
        "summary": content["summary"],
        "seconds": log.seconds,
        "report": str(page.absolute()),
    }
