"""``u2a-fast score --explain``: which route would score, why, and what it does in every module."""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.session import show_result
from u2a_fast.influence.scorer import InfluenceScorer
from u2a_fast.models.loading import load_model, resolve_device
from u2a_fast.store.scores import CALIBRATION

__all__ = ["explain_scoring"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def explain_scoring(p: Mapping[str, Any]) -> None:
    """Print what ``score`` would do with the same options ``p``; costs the objective's gradient and writes nothing."""
    tokenizer, settings = inputs.tokenization(p)
    objective = inputs.make_objective(p, inputs.read_objective_rows(p, tokenizer, settings))
    negatives = inputs.read_the_negatives(p, tokenizer, settings)
    model, tokenizer = load_model(p["model"], device=resolve_device(p["device"]), adapter=p["adapter"])
    by_layers = p["mode"] == o.ModeKind.layers
    options = {**p, "mode": o.ModeKind.reverse} if by_layers else p
    scorer = inputs.make_scorer(options, model, tokenizer, objective)
    inputs.check_topk(scorer, p)
    scorer.fit_curvature(list(islice(negatives, CALIBRATION)))
    passes = _passes(scorer, p)
    if p["json_output"]:
        show_result({"passes": passes}, as_json=True)
        return
    for found in passes:
        show_result({name: value for name, value in found.items() if name != "modules"}, as_json=False)
        for line in _grouped(found["modules"]):
            print(f"  {line}")


def _passes(scorer: InfluenceScorer, p: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The passes that the options ask for, in their order; each with its route, the reason and a rule by module."""
    if p["mode"] == o.ModeKind.layers:
        reason = "backward stops at the lowest block that counts; blocks are chosen on the first negatives scored"
        return [{"pass": "some layers", "route": "reverse", "reason": reason, "modules": scorer.explain()}]
    found: list[dict[str, Any]] = []
    if p["mode"] in (o.ModeKind.lowrank, o.ModeKind.shortlist):
        modules, energy = scorer.explain_lowrank()
        reason = f"asked for: {p['mode']}, rank {scorer.rank}"
        found.append({"pass": "low rank", "route": "reverse", "reason": reason, "energy": energy, "modules": modules})
    if p["mode"] != o.ModeKind.lowrank:
        choice = scorer.choice()
        found.append({"pass": "exact", "route": choice.mode, "reason": choice.reason, "modules": scorer.explain()})
    if p["top_k"] is not None:
        found[-1]["before"] = (
            "a bounded low-rank pass, its ranks planned on a sample of the negatives unless --rank is given"
        )
    return found


def _grouped(modules: Mapping[str, str]) -> list[str]:
    """A line for every rule and path, paths that differ in their numbers alone together, in the modules' order."""
    counts = Counter((_NUMBER.sub("*", path), rule) for path, rule in modules.items())
    return [f"{count:4} x {path}: {rule}" for (path, rule), count in counts.items()]
