"""``u2a-fast score --explain``: which route would score, why, and what it does in every module."""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.session import show_result
from u2a_fast.data import Negatives
from u2a_fast.influence.modes import PLAN_SAMPLE
from u2a_fast.influence.scorer import InfluenceScorer
from u2a_fast.models.loading import load_model, resolve_device
from u2a_fast.store.scores import CALIBRATION

__all__ = ["explain_scoring"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_RANK = re.compile(r"(?<=rank )\d+$")


def explain_scoring(p: Mapping[str, Any]) -> None:
    """Print what ``score`` would do with the same options ``p``; writes nothing.

    Costs the objective's gradient, and for a top k whose ranks are planned the sample that they are planned on.
    """
    tokenizer, settings = inputs.tokenization(p)
    objective = inputs.make_objective(p, inputs.read_objective_rows(p, tokenizer, settings))
    negatives = inputs.read_the_negatives(p, tokenizer, settings)
    model, tokenizer = load_model(p["model"], device=resolve_device(p["device"]), adapter=p["adapter"])
    by_layers = p["mode"] == o.ModeKind.layers
    options = {**p, "mode": o.ModeKind.reverse} if by_layers else p
    scorer = inputs.make_scorer(options, model, tokenizer, objective)
    inputs.check_topk(scorer, p)
    scorer.fit_curvature(list(islice(negatives, CALIBRATION)))
    passes = _passes(scorer, negatives, p)
    if p["json_output"]:
        show_result({"passes": passes}, as_json=True)
        return
    for found in passes:
        show_result({name: value for name, value in found.items() if name != "modules"}, as_json=False)
        for line in _grouped(found["modules"]):
            print(f"  {line}")


def _passes(scorer: InfluenceScorer, negatives: Negatives, p: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The passes that the options ask for, in their order; each with its route, the reason and a rule by module."""
    if p["mode"] == o.ModeKind.layers:
        reason = "backward stops at the lowest block that counts; blocks are chosen on the first negatives scored"
        return [{"pass": "some layers", "route": "reverse", "reason": reason, "modules": scorer.explain()}]
    found: list[dict[str, Any]] = []
    if p["mode"] in (o.ModeKind.lowrank, o.ModeKind.shortlist):
        modules, energy = scorer.explain_lowrank()
        reason = f"asked for: {p['mode']}, rank {scorer.rank}"
        found.append({"pass": "low rank", "route": "reverse", "reason": reason, "energy": energy, "modules": modules})
    if p["top_k"] is not None:
        found += _bounded(scorer, negatives, p)
    if p["mode"] != o.ModeKind.lowrank:
        choice = scorer.choice()
        exact = {"pass": "exact", "route": choice.mode, "reason": choice.reason}
        if p["top_k"] is not None and not found:
            exact["note"] = "a bounded pass before it would save nothing: all are scored exactly"
        found.append(exact | {"modules": scorer.explain()})
    return found


def _bounded(scorer: InfluenceScorer, negatives: Negatives, p: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pass of a certified top k before the exact one, with what its plan expects; none where it would not pay."""
    ranks, planned = p["rank"], {}
    reason = f"asked for: rank {ranks}"
    if ranks is None:
        plan = scorer.plan_topk(negatives, p["top_k"])
        if not plan.pays:
            return []
        ranks, reason = plan.ranks, f"ranks planned by cost on {PLAN_SAMPLE} negatives"
        planned = {"units": plan.units, "rescored_share": plan.rescored}
    modules, energy = scorer.explain_lowrank(ranks, bounded=True)
    made = {"pass": "bounded low rank", "route": "reverse", "reason": reason, "energy": energy}
    return [made | planned | {"modules": modules}]


def _grouped(modules: Mapping[str, str]) -> list[str]:
    """A line for every rule and path, in the modules' order.

    Paths that differ in their numbers alone share one, and so do rules that differ in their rank: rank 8 to 64.
    """
    ranks: dict[tuple[str, str], list[str]] = {}
    for path, rule in modules.items():
        line = _NUMBER.sub("*", path), _RANK.sub("{}", rule)
        ranks.setdefault(line, []).append("".join(_RANK.findall(rule)))
    return [f"{len(found):4} x {path}: {rule.format(_span(found))}" for (path, rule), found in ranks.items()]


def _span(ranks: list[str]) -> str:
    low, high = (end(ranks, key=lambda rank: int(rank or 0)) for end in (min, max))
    return low if low == high else f"{low} to {high}"
