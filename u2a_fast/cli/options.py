"""Every option, declared once, in groups that verbs take whole: name -> (declaration, default)."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from u2a_fast.cli.session import REQUIRED, load_config

Group = Mapping[str, tuple[Any, Any]]


class ObjectiveKind(StrEnum):
    """What "better" means: preference pairs, rewarded answers, or answers to imitate."""

    dpo = "dpo"
    reward = "reward"
    sft = "sft"


class Reduction(StrEnum):
    """How token NLLs make an example's."""

    mean = "mean"
    sum = "sum"


class LossKind(StrEnum):
    """Unlearning losses."""

    ga = "ga"
    npo = "npo"
    graddiff = "graddiff"


class RetainLossKind(StrEnum):
    """Retain terms."""

    nll = "nll"
    kl = "kl"


class CurvatureKind(StrEnum):
    """Surrogates of the inner problem's Hessian."""

    identity = "identity"
    fisher = "fisher"


class BadRowPolicy(StrEnum):
    """What a row that cannot be used does to the run."""

    error = "error"
    skip = "skip"


class ModeKind(StrEnum):
    """How negatives are scored; auto is exact."""

    auto = "auto"
    forward = "forward"
    reverse = "reverse"
    lowrank = "lowrank"
    shortlist = "shortlist"
    layers = "layers"


class DtypeKind(StrEnum):
    """Floating-point formats; auto is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class StrategyKind(StrEnum):
    """Which negatives are taken."""

    top_k = "top-k"
    threshold = "threshold"
    budget = "budget"
    as_released = "as-released"


class WeightsKind(StrEnum):
    """How strongly each is unlearned."""

    uniform = "uniform"
    eg = "eg"
    eg_released = "eg-released"


class TransformKind(StrEnum):
    """What is done to the scores before the exponential."""

    rank = "rank"
    clip = "clip"


class NonfinitePolicy(StrEnum):
    """What a NaN or infinite score does to a selection."""

    error = "error"
    drop = "drop"


class ApproximatePolicy(StrEnum):
    """What approximate scores beside exact ones do to a selection."""

    drop = "drop"
    keep = "keep"


class ProjectionKind(StrEnum):
    """How an index shortens gradients."""

    sketch = "sketch"
    random = "random"
    pca = "pca"
    identity = "identity"


def option(kind: Any, text: str, *names: str, **settings: Any) -> Any:
    """The declaration of one option of type ``kind``, described by ``text``."""
    return Annotated[kind, typer.Option(*names, help=text, **settings)]


def plain(value: Any) -> Any:
    """An option's value as the Python API takes it: choices as strings."""
    return str(value) if isinstance(value, StrEnum) else value


def _folder(given: str | Path) -> Path:
    """Of an empty text, as of a shell variable that is not set, ``Path`` makes the current folder."""
    if not str(given).strip():
        raise typer.BadParameter("expected a folder, got an empty text")
    return Path(given)


MAX_SEED = 2**31 - 1  # of an index, and within what every generator takes

_SOURCE = "JSON Lines or Parquet file, save_to_disk folder, or hub name."
_COLUMNS = "field=column, where the columns have other names; repeatable."

RUN: Group = {
    "config": (
        option(
            Path | None,
            "Options from a run.yaml or another YAML file; the command line wins.",
            "--config",
            is_eager=True,
            callback=load_config,
        ),
        None,
    ),
    "overwrite": (option(bool, "Replace results that are there.", "--overwrite"), False),
    "json_output": (option(bool, "The result as one JSON object on stdout.", "--json"), False),
    "debug": (option(bool, "Show the traceback of an error.", "--debug"), False),
}
OUT: Group = {"out": (option(Path, "Folder for the results and run.yaml.", parser=_folder), REQUIRED)}
MODEL: Group = {
    "model": (option(str, "Model or PEFT adapter folder, or hub name."), REQUIRED),
    "adapter": (option(Path | None, "PEFT adapter folder to put on the model."), None),
    "device": (option(str | None, '"cpu", "cuda", "cuda:1"...; default CUDA where there is one.'), None),
    "token_budget": (option(int | None, "Most tokens in a batch; default by device.", min=1), None),
    "seed": (option(int, "Seed of everything random.", min=0, max=MAX_SEED), 0),
}
LOADING: Group = {"dtype": (option(DtypeKind, "Format that the model is loaded in."), DtypeKind.auto)}
READING: Group = {
    "max_length": (option(int | None, "Most tokens in an example; default the model's context.", min=2), None),
    "add_bos": (
        option(
            bool | None, "Force the BOS token (EOS, without one); default as the tokenizer.", "--add-bos/--no-add-bos"
        ),
        None,
    ),
    "on_bad_row": (
        option(BadRowPolicy, "error: before any work starts. skip: listed in skipped.jsonl."),
        BadRowPolicy.error,
    ),
}
NEGATIVES: Group = {
    "negatives": (option(str, f"Answers that the model should not give: {_SOURCE}"), REQUIRED),
    "columns": (option(list[str] | None, f"Of the negatives: {_COLUMNS}"), None),
    "split": (option(str | None, "Split of the negatives, where they are a dataset."), None),
    "streaming": (option(bool, "Do not check the negatives before the work starts.", "--streaming"), False),
}
OBJECTIVE: Group = {
    "preferences": (option(str | None, f"Preference pairs, for the objective dpo: {_SOURCE}"), None),
    "rewards": (option(str | None, f"Answers with rewards, for the objective reward: {_SOURCE}"), None),
    "positives": (option(str | None, f"Answers to imitate, for the objective sft: {_SOURCE}"), None),
    "objective": (
        option(ObjectiveKind | None, "Default: by which of --preferences, --rewards, --positives is given."),
        None,
    ),
    "beta": (option(float, "DPO's inverse temperature, 1/nats."), 0.1),
    "objective_reduction": (
        option(Reduction | None, "Over the answer tokens in the objective; default sum for dpo, else mean."),
        None,
    ),
    "objective_columns": (option(list[str] | None, f"Of the objective's rows: {_COLUMNS}"), None),
    "objective_split": (option(str | None, "Split of the objective's rows, where they are a dataset."), None),
}
PARAMETERS: Group = {
    "parameters": (
        option(str, '"trainable", "all", "re:<regex>", or of linear,bias,norm,embedding,lm_head,lora with commas.'),
        "trainable",
    ),
}
LOSS: Group = {
    "loss": (option(LossKind, "Unlearning loss."), LossKind.ga),
    "npo_beta": (option(float, "NPO's inverse temperature, 1/nats."), 0.1),
    "reduction": (option(Reduction, "Over the answer tokens of a negative."), Reduction.mean),
}
CURVATURE: Group = {
    "curvature": (option(CurvatureKind, "Surrogate of the unlearning problem's Hessian."), CurvatureKind.identity),
    "damping": (option(float, "Damping over the mean of the curvature's diagonal.", min=0), 0.1),
}
SIGNAL: Group = {"signal_check": (option(bool, "First ask whether the preference signal generalizes."), True)}
SELECTION: Group = {
    "strategy": (
        option(StrategyKind, "top-k, threshold (scores above it), budget (of tokens), or the release's."),
        StrategyKind.top_k,
    ),
    "k": (option(int | None, "Most negatives, for top-k and as-released.", min=1), None),
    "threshold": (option(float | None, "For the strategy threshold; default 0."), None),
    "select_tokens": (option(int | None, "Most answer tokens in all, for the strategy budget.", min=1), None),
    "weights": (
        option(WeightsKind, "uniform, eg (exponentiated gradient), or the release's eg of the wrong sign."),
        WeightsKind.uniform,
    ),
    "eta": (option(float | None, "Step size of the weights; default 1 for eg, 0.01 for eg-released."), None),
    "transform": (option(TransformKind, "Of the scores before the exponential, for eg."), TransformKind.rank),
    "clip": (option(float, "Fraction winsorized at each end, for clip.", min=0), 0.05),
    "min_ess": (option(float, "Floor of the effective sample size, as a fraction.", min=0, max=1), 0.5),
    "cap": (option(float | None, "Largest weight, in multiples of the mean."), None),
    "nonfinite": (
        option(NonfinitePolicy, "What NaN and infinite scores do: error, or drop."),
        NonfinitePolicy.error,
    ),
}
TRAINING: Group = {
    "retain": (option(str | None, f"Answers to keep, for the retain term: {_SOURCE}"), None),
    "retain_loss": (option(RetainLossKind, "NLL, or KL from the model at the start."), RetainLossKind.nll),
    "retain_weight": (option(float, "Factor on the retain term.", min=0), 1.0),
    "retain_batch_size": (option(int | None, "Answers to keep a step; default as --batch-size.", min=1), None),
    "proximal": (option(float, "lambda of lambda ||theta - theta_0||^2.", min=0), 0.1),
    "learning_rate": (option(float, "AdamW's.", "--learning-rate", "--lr"), 1e-5),
    "weight_decay": (option(float, "AdamW's.", min=0), 0.0),
    "max_grad_norm": (option(float, "Gradient norm to clip at; 0: never.", min=0), 1.0),
    "batch_size": (option(int, "Negatives an optimizer step.", min=1), 8),
    "micro_batch_size": (option(int | None, "Negatives in memory at once; divides --batch-size.", min=1), None),
    "epochs": (option(int, "Passes over the chosen negatives.", min=1), 1),
    "max_steps": (option(int | None, "Optimizer steps, in place of --epochs.", min=1), None),
    "warmup_steps": (option(int, "Steps of linear warm-up.", min=0), 0),
    "schedule": (option(str, "Learning rate schedule, by transformers' names."), "constant_with_warmup"),
    "max_drift": (option(float, "Rise of the mean NLL, in nats, at which to stop; 0: no guard.", min=0), 1.0),
    "drift_every": (option(int, "Steps between two looks at the drift.", min=1), 5),
    "drift_sample": (option(int, "Negatives that the drift is measured on.", min=1), 64),
    "save_every": (option(int | None, "Steps between checkpoints; default none.", min=1), None),
}
ROUNDS: Group = {
    **SELECTION,
    "k": (option(int | None, "Most negatives a round, for top-k and as-released.", min=1), 1024),
    "weights": (SELECTION["weights"][0], WeightsKind.eg),
    "rounds": (option(int, "Most rounds.", min=1), 3),
    "heldout_fraction": (option(float, "Part of the objective's rows held out for the early stop."), 0.25),
    "patience": (option(int, "Rounds without a lower held-out loss before stopping.", min=1), 1),
    "nll_sample": (option(int, "Negatives that the mean NLL of all is measured on.", min=1), 256),
}
