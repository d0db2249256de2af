"""From options to models, negatives, objectives and scorers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from u2a_fast.cli.options import ObjectiveKind, plain
from u2a_fast.cli.session import column_map
from u2a_fast.data import Negatives, Rows, read_negatives, read_positives, read_preferences, read_rewards
from u2a_fast.influence.objectives import DPO, SFT, Objective, Reward
from u2a_fast.influence.scorer import InfluenceScorer
from u2a_fast.models.loading import context_length, load_tokenizer, model_files

__all__ = [
    "check_topk",
    "data_files",
    "input_files",
    "make_objective",
    "make_scorer",
    "objective_kind",
    "parameter_selection",
    "read_objective_rows",
    "read_the_negatives",
    "scoring_dtype",
    "tokenization",
]

_SOURCES = {ObjectiveKind.dpo: "preferences", ObjectiveKind.reward: "rewards", ObjectiveKind.sft: "positives"}
_READERS = {ObjectiveKind.dpo: read_preferences, ObjectiveKind.reward: read_rewards, ObjectiveKind.sft: read_positives}


def objective_kind(options: Mapping[str, Any]) -> ObjectiveKind:
    """The objective that was named, or the one whose data were given."""
    given = [kind for kind, source in _SOURCES.items() if options[source] is not None]
    flags = "--preferences (dpo), --rewards (reward), --positives (sft)"
    named = options["objective"]
    if named is None and len(given) != 1:
        got = "none" if not given else ", ".join(f"--{_SOURCES[kind]}" for kind in given)
        raise ValueError(f"[objective] expected one of {flags}, got {got}")
    kind = ObjectiveKind(named) if named is not None else given[0]
    if options[_SOURCES[kind]] is None:
        raise ValueError(f"[objective] expected --{_SOURCES[kind]} for the objective {kind}: {flags}")
    return kind


def tokenization(options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model's tokenizer, and how to read rows with it; found without loading the model."""
    tokenizer = load_tokenizer(options["model"])
    length = options["max_length"] or context_length(options["model"], tokenizer)
    settings = {"max_length": length, "on_bad_row": str(options["on_bad_row"]), "add_bos": options["add_bos"]}
    return tokenizer, settings


def read_the_negatives(options: Mapping[str, Any], tokenizer: Any, settings: Mapping[str, Any]) -> Negatives:
    """The negatives that the options name, checked unless they stream."""
    return read_negatives(
        options["negatives"],
        tokenizer,
        columns=column_map(options["columns"]),
        split=options["split"],
        streaming=options["streaming"],
        **settings,
    )


def read_objective_rows(options: Mapping[str, Any], tokenizer: Any, settings: Mapping[str, Any]) -> Rows:
    """The rows of the objective that the options name."""
    kind = objective_kind(options)
    return _READERS[kind](
        options[_SOURCES[kind]],
        tokenizer,
        columns=column_map(options["objective_columns"]),
        split=options["objective_split"],
        **settings,
    )


def make_objective(options: Mapping[str, Any], rows: Rows) -> Objective:
    """DPO, Reward or SFT on ``rows``."""
    kind = objective_kind(options)
    reduction = options["objective_reduction"]
    if kind is ObjectiveKind.dpo:
        return DPO(rows, beta=options["beta"], reduction=str(reduction or "sum"))
    family = Reward if kind is ObjectiveKind.reward else SFT
    return family(rows, reduction=str(reduction or "mean"))


def parameter_selection(text: str) -> str | list[str]:
    """As ``selected_parameters`` takes it: a word, a regular expression, or kinds between commas."""
    if text in ("trainable", "all") or text.startswith("re:"):
        return text
    return [kind.strip() for kind in text.split(",")]


def scoring_dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """The precision of the passes, None for the model's own."""
    dtype = str(options["dtype"])
    return None if dtype == "auto" else getattr(torch, dtype)


def make_scorer(
    options: Mapping[str, Any], model: torch.nn.Module, tokenizer: Any, objective: Objective
) -> InfluenceScorer:
    """A scorer with the options' curvature, loss, parameters and precision."""
    names = ("mode", "rank", "fraction", "batch_invariant")
    return InfluenceScorer(
        model,
        tokenizer,
        objective,
        str(options["curvature"]),
        parameters=parameter_selection(options["parameters"]),
        loss=str(options["loss"]),
        npo_beta=options["npo_beta"],
        reduction=str(options["reduction"]),
        damping=options["damping"],
        token_budget=options["token_budget"],
        dtype=scoring_dtype(options),
        **{name: plain(options[name]) for name in names if options.get(name) is not None},
    )


def check_topk(scorer: InfluenceScorer, options: Mapping[str, Any]) -> None:
    """Raise ValueError if ``--top-k`` asks for what the scorer cannot certify, in the options' words."""
    if options["top_k"] is None:
        return
    try:
        scorer.check_topk(options["top_k"], rank=options["rank"])
    except ValueError as error:
        raise ValueError(f"{error} (here --dtype float32, or --mode shortlist, which certifies nothing)") from error


def input_files(options: Mapping[str, Any], *sources: Negatives | Rows) -> list[Path]:
    """The local files of the model and of what the sources read, to be hashed."""
    return [*model_files(options["model"], options["adapter"]), *data_files(*sources)]


def data_files(*sources: Negatives | Rows) -> list[Path]:
    """The local files that the sources read."""
    return [file for source in sources for file in source.files]
