"""The report's sections, each made from what was found or left out."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from u2a_fast.report import plots
from u2a_fast.report.artifacts import Artifacts
from u2a_fast.report.parts import Notice, Section, Table, Tile, figure, number, table
from u2a_fast.statistics import auc, spearman

__all__ = ["sections", "tiles"]

_EXAMPLES = 8  # best and worst each
_SKIPPED = 20
_ROUND_PLOTS = 6


def sections(found: Artifacts) -> list[Section]:
    """Every section for which there is something to show, in reading order."""
    made = (_demo(found), _signal(found), _scores(found), _selection(found), _rounds(found))
    rest = (_metrics(found), _examples(found), _left_out(found), _provenance(found))
    return [section for section in (*made, *rest) if section is not None]


def tiles(found: Artifacts) -> list[Tile]:
    """The headline numbers."""
    out = []
    if found.scores is not None:
        score = found.scores["score"]
        out += [
            Tile("negatives scored", f"{len(score):,}"),
            Tile("with a gain (s > 0)", f"{int((score > 0).sum()):,}"),
        ]
        out.append(Tile("NaN or infinite", f"{int((~np.isfinite(score)).sum()):,}"))
    if found.selection is not None:
        out.append(Tile("selected", f"{len(found.selection['weight']):,}"))
        out.append(Tile("effective sample size", f"{_effective_size(found.selection['weight']):.0f}"))
    if found.signal is not None:
        out.append(Tile("signal: cosine of halves", number(found.signal["cosine"])))
    out.append(Tile("rows skipped", f"{len(found.skipped):,}"))
    return out


def _effective_size(weight: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965); 0 without weight."""
    total = float((weight**2).sum())
    return float(weight.sum()) ** 2 / total if total > 0 else 0.0


def _demo(found: Artifacts) -> Section | None:
    if found.demo is None:
        return None
    demo, rows = found.demo, found.demo["rows"]
    section = Section("What the demo set out to show", list(demo["description"]))
    section.notices = [Notice(claim["text"], good=claim["holds"]) for claim in demo["claims"]]
    seed, loss, before = rows[0]["seed"], "held-out preference loss", demo["before"]
    paths = {row["arm"]: row["path"] for row in rows if row["seed"] == seed}
    section.figures = [
        figure(plots.by_arm(rows, "heldout_loss", "At matched steps", loss, before), "loss at matched steps"),
        figure(plots.by_arm(rows, "matched_loss", "At matched forgetting", loss, before), "loss at matched forgetting"),
        figure(plots.by_arm(rows, "heldout_accuracy", "At matched steps", "held-out accuracy"), "held-out accuracy"),
        figure(plots.forgetting_paths(paths, f"Along the run of seed {seed}"), "loss along forgetting"),
    ]
    section.tables = [
        table(demo["summary"]["header"], demo["summary"]["rows"], title="Means over seeds"),
        *(table(list(of[0]), [list(row.values()) for row in of], title=title) for title, of in demo["seeds"].items()),
    ]
    return section


def _signal(found: Artifacts) -> Section | None:
    signal = found.signal
    if signal is None:
        return None
    section = Section("Does the preference signal generalize?")
    section.text.append(
        "The preference set is split into two random halves. If their gradients, and the scores that they give, do "
        "not agree, scores describe the preference set itself and nothing else."
    )
    if signal.get("warning"):
        section.notices.append(Notice(signal["warning"]))
    section.tables.append(
        table(
            ("agreement of the halves", "value", "95 % interval"),
            [
                ("cosine of the gradients", signal["cosine"], number(signal["cosine_ci"])),
                ("Spearman of the scores", signal["spearman"], number(signal["spearman_ci"])),
            ],
        )
    )
    return section


def _scores(found: Artifacts) -> Section | None:
    if found.scores is None or not len(found.scores["score"]):
        return None
    score, kinds = found.scores["score"], found.kinds
    section = Section("Scores")
    bad = int((~np.isfinite(score)).sum())
    fits = found.scores.get("fits")
    unfit = 0 if fits is None else int((~fits).sum())
    if unfit:
        section.notices.append(
            Notice(f"{unfit} of {len(score)} negatives have no score (NaN): they do not fit in memory even alone.")
        )
    if bad > unfit:
        section.notices.append(
            Notice(
                f"{bad - unfit} of {len(score)} scores are NaN or infinite; they are left as they are and not drawn."
            )
        )
    if bad < len(score):
        section.figures = [
            figure(plots.score_distribution(score, kinds), "distribution of the scores"),
            figure(plots.cumulative_gain(score), "cumulative predicted gain"),
        ]
    if kinds is not None and {"harmful", "harmless"} <= set(kinds) and bad < len(score):
        section.figures.append(figure(plots.kinds_found(score, kinds, "harmful"), "planted negatives found"))
        value = auc(score[kinds == "harmful"], score[kinds == "harmless"])
        section.text.append(
            f"A planted harmful answer scores above a planted harmless one with probability {value:.3f} (AUC)."
        )
    if found.realized:
        _add_realized(section, found.realized)
    return section


def _add_realized(section: Section, rows: list[dict[str, Any]]) -> None:
    rank = spearman(np.array([r["predicted"] for r in rows]), np.array([r["realized"] for r in rows]))
    section.text.append(
        f"{len(rows)} negatives were each unlearned alone, a few small steps from the scored model: the fall of the "
        f"preference loss has Spearman {rank:.3f} with the score."
    )
    section.figures.append(figure(plots.realized_gain(rows, rank), "predicted against realized gain"))


def _selection(found: Artifacts) -> Section | None:
    if found.selection is None or not len(found.selection["weight"]):
        return None
    weight, score = found.selection["weight"], found.selection["score"]
    section = Section("Selection and weights")
    section.tables.append(
        table(
            ("selected", "effective sample size", "largest weight", "smallest weight", "lowest score"),
            [(len(weight), _effective_size(weight), float(weight.max()), float(weight.min()), float(score.min()))],
        )
    )
    section.figures.append(figure(plots.weights_by_score(score, weight), "weights against scores"))
    return section


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested mappings, by its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _course(flat: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(rounds done, value) of a metric, from the value before the first round where it was measured."""
    before = flat[0].get(f"{name}_before")
    start = [(0.0, before)] if before is not None else []
    return start + [(i + 1.0, entry[name]) for i, entry in enumerate(flat) if name in entry]


def _rounds(found: Artifacts) -> Section | None:
    if not found.rounds:
        return None
    flat = [dict(_numbers(entry)) for entry in found.rounds]
    names = [name for name in dict.fromkeys(name for entry in flat for name in entry) if name != "round"]
    courses = {name: _course(flat, name) for name in names if not name.endswith("_before")}
    varying = [name for name, course in courses.items() if len({value for _, value in course}) > 1]
    losses_first = sorted(varying, key=lambda name: (not ("loss" in name or "nll" in name), names.index(name)))
    section = Section("Round by round")
    for name in losses_first[:_ROUND_PLOTS]:
        section.figures.append(figure(plots.round_metric(name.replace("_", " "), courses[name]), name, "third"))
    header = ("metric", *(f"round {i}" for i in range(len(flat))))
    section.tables.append(table(header, [(name, *(entry.get(name) for entry in flat)) for name in names]))
    return section


def _metrics(found: Artifacts) -> Section | None:
    if not found.metrics:
        return None
    section = Section("Measurements")
    for place, metrics in found.metrics.items():
        rows = [(name, value, number(_interval(metrics, name))) for name, value in _numbers(metrics)]
        section.tables.append(table(("figure", "value", "95 % interval"), rows, title=place))
    return section


def _interval(metrics: Mapping[str, Any], name: str) -> Any:
    *path, last = name.split(".")
    for key in path:
        metrics = metrics[key]
    return metrics.get(f"{last}_ci")


def _examples(found: Artifacts) -> Section | None:
    if found.scores is None or not found.texts:
        return None
    score, names = found.scores["score"], found.scores["id"]
    order = [i for i in np.argsort(-score, kind="stable") if np.isfinite(score[i]) and names[i] in found.texts]
    section = Section("Best and worst examples")
    worst = order[::-1][: min(_EXAMPLES, len(order) - min(_EXAMPLES, len(order)))]
    for title, rows in (("Most worth unlearning", order[:_EXAMPLES]), ("Least worth unlearning", worst)):
        if rows:
            section.tables.append(_text_table(found, [int(i) for i in rows], title))
    return section


def _text_table(found: Artifacts, rows: list[int], title: str) -> Table:
    assert found.scores is not None
    texts = [found.texts[found.scores["id"][i]] for i in rows]
    header = ["id", "score", "NLL", "prompt", "response"]
    known = any(text.kind for text in texts)
    cells: list[list[Any]] = []
    for i, text in zip(rows, texts, strict=True):
        figures = [float(found.scores[column][i]) for column in ("score", "nll")]
        cells.append(
            [str(found.scores["id"][i]), *figures, text.prompt, text.response, *([text.kind] if known else [])]
        )
    return table([*header, *(["truth"] if known else [])], cells, title=title)


def _left_out(found: Artifacts) -> Section | None:
    if not found.skipped:
        return None
    section = Section("Rows left out")
    section.text.append(f"{len(found.skipped)} bad rows were skipped.")
    rows = [(str(row.get("file")), row.get("line"), str(row.get("reason"))) for row in found.skipped[:_SKIPPED]]
    section.tables.append(table(("file", "line", "reason"), rows))
    if len(found.skipped) > _SKIPPED:
        section.text.append(f"The first {_SKIPPED} of them are shown; all are in skipped.jsonl.")
    return section


def _provenance(found: Artifacts) -> Section | None:
    if not found.runs:
        return None
    section = Section("What was run, with what")
    rows = [
        (place, str(run.get("command")), str(run.get("device")), str(run.get("started")), str(run.get("git_commit")))
        for place, run in found.runs.items()
    ]
    section.tables.append(table(("folder", "command", "device", "started", "commit"), rows))
    versions: dict[str, Any] = next((run["versions"] for run in found.runs.values() if run.get("versions")), {})
    section.text.append("Versions: " + ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items()))
    return section
