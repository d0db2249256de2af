"""The signal check, before any scoring: do two halves of the preference set ask for the same thing?"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from u2a_fast.cli.session import note
from u2a_fast.data import Negatives, Rows
from u2a_fast.influence.scorer import InfluenceScorer
from u2a_fast.influence.signal import check_rows, signal_check
from u2a_fast.store import read_json, write_text

__all__ = ["check_signal", "refuse_few_rows"]

SIGNAL_SAMPLE = 256  # negatives; the spread of a Spearman correlation over them is about 1/16


def refuse_few_rows(rows: Rows) -> None:
    """Raise ValueError, before any work, where the objective has too few rows for ``check_signal``."""
    with _way_out():
        check_rows(rows)


@contextmanager
def _way_out() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (--no-signal-check goes on without it)") from error


def check_signal(
    scorer: InfluenceScorer, negatives: Negatives, out: Path, *, seed: int, resumed: bool
) -> dict[str, Any]:
    """Check the signal, or read the check of the run that is ``resumed``; print it and store it in signal.json."""
    path = out / "signal.json"
    if resumed and path.exists():
        signal = read_json(path, ("cosine", "cosine_ci", "spearman", "warning"))
    else:
        with _way_out():
            report = signal_check(scorer, _sample(negatives, SIGNAL_SAMPLE, seed), seed=seed)
        signal = report.to_dict()
        write_text(path, json.dumps(signal, indent=2))
    low, high = signal["cosine_ci"]
    note(f"signal check: cosine of gradient halves {signal['cosine']:.3f} [{low:.3f}, {high:.3f}], "
         f"Spearman of their scores {signal['spearman']:.3f}")  # fmt: skip
    if signal["warning"]:
        Console(stderr=True).print(f"warning: {signal['warning']}", style="bold yellow", markup=False, soft_wrap=True)
    return signal


def _sample(negatives: Negatives, size: int, seed: int) -> list[dict[str, Any]]:
    """A uniform sample without holding the rest (reservoir sampling, Vitter 1985, algorithm R), in source order."""
    generator = random.Random(seed)
    kept: list[tuple[int, dict[str, Any]]] = []
    for index, row in enumerate(negatives):
        if len(kept) < size:
            kept.append((index, row))
        elif (slot := generator.randint(0, index)) < size:
            kept[slot] = (index, row)
    return [row for _, row in sorted(kept, key=lambda item: item[0])]
