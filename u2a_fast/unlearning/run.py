"""One run of weighted unlearning, from a model to a model on disk."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from u2a_fast.store import write_text
from u2a_fast.unlearning.batches import WeightedNegatives
from u2a_fast.unlearning.config import UnlearnConfig
from u2a_fast.unlearning.drift import DriftGuard
from u2a_fast.unlearning.fingerprint import check_fingerprint, hash_examples, hash_model, hash_plain
from u2a_fast.unlearning.measure import nlls, sample_positions
from u2a_fast.unlearning.snapshot import ParameterSnapshot
from u2a_fast.unlearning.trainer import UnlearnTrainer

__all__ = ["TrainOutcome", "UnlearnResult", "save_model", "train", "unlearn"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainOutcome:
    """How unlearning went.

    Attributes:
        steps: optimizer steps taken.
        stopped_by_drift: the drift guard ended it.
        nll_before, nll_after: mean NLL in nats of the negatives that the drift is measured on.
        history: one dict an optimizer step (loss and its terms, gradient norm, learning rate), one a look at the drift.
    """

    steps: int
    stopped_by_drift: bool
    nll_before: float
    nll_after: float
    history: list[dict[str, float]]

    @property
    def drift(self) -> float:
        """Rise of the mean NLL, in nats."""
        return self.nll_after - self.nll_before


@dataclass(frozen=True)
class UnlearnResult(TrainOutcome):
    """A ``TrainOutcome`` and the folder of the unlearned model."""

    model_dir: Path


class _Report(TrainerCallback):
    """Tells ``on_progress`` about every optimizer step."""

    def __init__(self, on_progress: Progress) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_progress(state.global_step, state.max_steps)


def _arguments(config: UnlearnConfig, folder: Path, device: torch.device) -> TrainingArguments:
    micro = config.micro_batch_size or config.batch_size
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
    )
    # without a launcher the Trainer would spread one process over all visible GPUs by DataParallel
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: the Trainer writes trainer_state.json last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return True


def train(
    model: nn.Module,
    negatives: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    *,
    config: UnlearnConfig,
    folder: Path,
    retain: Sequence[Mapping[str, Any]] | None = None,
    reference: ParameterSnapshot | None = None,
    nll_reference: Sequence[float] | Tensor | None = None,
    on_progress: Progress | None = None,
) -> TrainOutcome:
    """Unlearn in place; with ``config.save_every``, resume from the last checkpoint in ``folder``, where new ones go.

    Other arguments are those of ``unlearn`` and ``UnlearnTrainer``.
    """
    dataset = WeightedNegatives(negatives, weights)
    args = _arguments(config, folder, next(model.parameters()).device)
    trainer = UnlearnTrainer(
        model, args, dataset, config=config, retain=retain, reference=reference, nll_reference=nll_reference
    )
    trainer.remove_callback(PrinterCallback)
    looked_at = [negatives[i] for i in sample_positions(len(negatives), config.drift_sample, config.seed)]
    limit = math.inf if config.max_drift is None else config.max_drift
    guard = DriftGuard(model, looked_at, reduction=config.reduction, max_drift=limit, every=config.drift_every)
    if config.max_drift is not None:
        trainer.add_callback(guard)
    if on_progress is not None:
        trainer.add_callback(_Report(on_progress))
    training = model.training
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if config.save_every else None)
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
    after = nlls(model, looked_at, reduction=config.reduction).mean().item()
    if not math.isfinite(after):
        raise FloatingPointError(
            f"[unlearn] the NLL of the negatives is {after} after step {trainer.state.global_step}"
        )
    state = trainer.state
    history = [row for row in state.log_history if "train_runtime" not in row]
    return TrainOutcome(state.global_step, state.global_step < state.max_steps, guard.start, after, history)


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """``save_pretrained`` of model and tokenizer (unless None) into ``folder``, which is whole or absent."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def unlearn(
    model: nn.Module,
    tokenizer: Any,
    negatives: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    *,
    config: UnlearnConfig | None = None,
    retain: Sequence[Mapping[str, Any]] | None = None,
    output_dir: Path | str,
    on_progress: Progress | None = None,
) -> UnlearnResult:
    """Unlearn negatives by their weights, in place, and save the model.

    With ``config.save_every``, a run that was cut off resumes from its last checkpoint and ends in the same parameters;
    the model given must then be the original again.

    Args:
        model: a transformers causal LM or a PEFT model around one; parameters that require gradients are trained.
        tokenizer: saved beside the model; None: not saved.
        negatives: n token examples.
        weights: n weights >= 0, as ``Selection.weight`` (mean 1).
        config: what to do; None: the defaults.
        retain: positives, token examples or rows with an ``example``; needed by loss ``"graddiff"``.
        output_dir: gets ``model/`` and ``metrics.json``.
        on_progress: called with (optimizer steps done, in all) after each.

    Raises:
        ValueError: arguments contradict each other, or ``output_dir`` holds checkpoints of another run.
        FloatingPointError: the loss became NaN or infinite; nothing is saved.
    """
    config = config or UnlearnConfig()
    out = Path(output_dir)
    checkpoints = out / "checkpoints"
    if config.save_every:
        parts = {
            "config": hash_plain(asdict(config)),
            "negatives": hash_examples(negatives),
            "weights": hash_plain([float(w) for w in weights]),
            "retain": hash_examples(retain or ()),
            "model": hash_model(model),
        }
        check_fingerprint(checkpoints / "fingerprint.json", parts)
    outcome = train(
        model, negatives, weights, config=config, folder=checkpoints, retain=retain, on_progress=on_progress
    )
    save_model(model, tokenizer, out / "model")
    metrics = {key: value for key, value in asdict(outcome).items() if key != "history"}
    write_text(
        out / "metrics.json",
        json.dumps({**metrics, "drift": outcome.drift, "history": outcome.history}, indent=2) + "\n",
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return UnlearnResult(**vars(outcome), model_dir=out / "model")
