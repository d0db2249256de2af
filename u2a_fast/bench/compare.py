"""Two files of rows side by side: what became slower or faster by more than the measurement's own noise.

The noise of a ratio of medians is taken from the spread of both measurements: the logarithms of p80 / p20, added in
quadrature. For 5 rounds with normal errors that is 3 standard errors of the ratio; more rounds do not lower it, because
what disturbs one round of a run tends to disturb them all.

A machine that others use too is slower at everything at times, and a ratio alone cannot tell. Each row therefore holds
yardsticks that took turns with the op: the ceiling that limits the case, the reference, the composition in PyTorch and
the bare matrix product. Their median change is the machine's; a change of the op counts only if it is beyond the noise
both as measured and relative to that.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from u2a_fast.bench.rows import Row, bandwidth, key, number, spread

__all__ = ["Change", "Comparison", "compare"]

Verdict = Literal["slower", "faster", "same", "machine"]


@dataclass(frozen=True)
class Change:
    """One case in both files.

    Attributes:
        place: the machine's name.
        case: its name.
        old: median seconds before.
        new: median seconds now.
        ratio: new over old.
        bound: the least ratio that counts as a change, from noise and threshold.
        machine: how many times as long the yardsticks take now; 1.0 where the rows hold none.
        verdict: "machine" is a change that the yardsticks share, so that the op need not be its cause.
    """

    place: str
    case: str
    old: float
    new: float
    ratio: float
    bound: float
    machine: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """The changes, and what could not be compared with the reason."""

    changes: list[Change]
    apart: list[tuple[str, str]]

    @property
    def regressions(self) -> list[Change]:
        """What became slower."""
        return [change for change in self.changes if change.verdict == "slower"]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON holds it."""
        apart = [{"case": case, "reason": reason} for case, reason in self.apart]
        changes = [asdict(change) for change in self.changes]
        return {"regressions": len(self.regressions), "changes": changes, "not_comparable": apart}


def compare(old: Sequence[Row], new: Sequence[Row], *, threshold: float = 0.05) -> Comparison:
    """Compare the rows of the same machine, benchmark and case (which names dtype, device and threads).

    Args:
        old: rows before; where a case has several, the last one counts.
        new: rows now.
        threshold: the least relative change of time to report, however small the noise.

    Raises:
        ValueError: a row's numbers are no measurement, the threshold is negative, or nothing can be compared.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"[bench] expected --threshold of at least 0, got {threshold}")
    before, now = ({key(row): row for row in rows} for rows in (old, new))
    shared = [name for name in now if name in before]
    timed = [name for name in shared if "seconds" in before[name] and "seconds" in now[name]]
    if not timed:
        raise ValueError(
            f"[bench] expected rows of a case and machine that both files time, got {len(before)} and {len(now)} rows "
            f"of which {len(shared)} have a counterpart and none has times"
        )
    apart = [(name[2], "holds no times of calls") for name in shared if name not in timed]
    apart += _alone(before, now, "old") + _alone(now, before, "new")
    return Comparison([_change(before[name], now[name], threshold) for name in timed], apart)


def _alone(rows: dict[Any, Row], others: dict[Any, Row], which: str) -> list[tuple[str, str]]:
    elsewhere = {other[1:]: other[0] for other in others}
    found = []
    for name in rows:
        if name not in others:
            place = elsewhere.get(name[1:])
            reason = f"measured on {name[0]}, the other file's on {place}" if place else f"only in the {which} file"
            found.append((name[2], reason))
    return found


def _change(old: Row, new: Row, threshold: float) -> Change:
    (low, before, high), (new_low, now, new_high) = spread(old), spread(new)
    noise = math.hypot(math.log(high / low), math.log(new_high / new_low))
    ratio, bound, machine = now / before, max(1 + threshold, math.exp(noise)), _machine(old, new)
    return Change(new["machine"], new["case"], before, now, ratio, bound, machine, _verdict(ratio, machine, bound))


def _verdict(ratio: float, machine: float, bound: float) -> Verdict:
    if 1 / bound <= ratio <= bound:
        return "same"
    if ratio > bound:
        return "slower" if ratio / machine > bound else "machine"
    return "faster" if ratio / machine < 1 / bound else "machine"


def _machine(old: Row, new: Row) -> float:
    """Median change of the time of the yardsticks that both rows hold."""
    changes = []
    if all(name in row for row in (old, new) for name in ("flops", "bytes", "gemm_gflops", "copy_gbytes")):
        flops, moved = number(new, "flops"), number(new, "bytes")
        least = [max(flops / number(row, "gemm_gflops"), moved / bandwidth(row)) for row in (old, new)]
        changes.append(least[1] / least[0])
    before, now = (_yardsticks(row) for row in (old, new))
    changes += [now[name] / before[name] for name in now if name in before]
    return median(changes) if changes else 1.0


def _yardsticks(row: Row) -> dict[str, float]:
    times = row.get("yardstick_seconds", {})
    if not isinstance(times, dict):
        raise ValueError(f"[bench] expected yardstick_seconds by name in the row of {row['case']}, got {times!r}")
    return {name: number({**times, "case": row["case"]}, name) for name in times}
