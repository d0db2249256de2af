"""Weighted unlearning on the transformers Trainer.

An optimizer step over n negatives and R positives descends

    (1 / n) sum_i w_i phi(NLL_i) + lambda ||theta - theta_0||^2 + c (1 / R) sum_j retain_j

whatever the micro-batches that it is split into.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from u2a_fast.data.packing import Example
from u2a_fast.losses import unlearning_loss
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.unlearning.batches import collate, unpad
from u2a_fast.unlearning.config import UnlearnConfig
from u2a_fast.unlearning.measure import example_of, nlls
from u2a_fast.unlearning.retain import RetainSampler, retain_losses
from u2a_fast.unlearning.snapshot import ParameterSnapshot

__all__ = ["UnlearnTrainer"]


class UnlearnTrainer(Trainer):
    """Descends weighted per-example unlearning losses on one device.

    The model as given is theta_0 (the proximal center, the KL and NPO reference) unless ``reference`` says otherwise,
    also when training resumes from a checkpoint.

    Args:
        model: a transformers causal LM or a PEFT model around one; parameters that require gradients are trained.
        args: ``TrainingArguments`` with ``remove_unused_columns=False``; its batch size, steps and optimizer count,
            those of ``config`` do not.
        train_dataset: rows ``input_ids``, ``labels``, ``weight`` and ``index`` (the row's own position), as
            ``WeightedNegatives`` has.
        config: loss, proximal and retain terms.
        retain: positives, token examples or rows with an ``example``.
        reference: theta_0; None: taken here where the loss needs it.
        nll_reference: NLL of every row at theta_0, reduced as ``config.reduction`` says, for NPO; None: measured here.
        **options: further arguments of ``Trainer``.

    Raises:
        ValueError: the configuration, the arguments and the data contradict each other.
        FloatingPointError: the loss of a step is NaN or infinite (from ``train``).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        *,
        config: UnlearnConfig,
        retain: Sequence[Mapping[str, Any]] | None = None,
        reference: ParameterSnapshot | None = None,
        nll_reference: Sequence[float] | Tensor | None = None,
        **options: Any,
    ) -> None:
        if args.remove_unused_columns:
            raise ValueError(
                "[UnlearnTrainer] expected args.remove_unused_columns=False: the column weight must survive"
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"[UnlearnTrainer] expected one process and one device, got {args.world_size} and {args.n_gpu} GPUs"
            )
        if args.bf16 or args.fp16:
            raise ValueError(
                "[UnlearnTrainer] expected args.bf16 and args.fp16 False: autocast does not reach the packed forward "
                "pass; load the model in that precision instead"
            )
        if config.loss == "npo" and options.get("eval_dataset") is not None:
            raise ValueError('[UnlearnTrainer] expected no eval_dataset for loss "npo": its reference NLLs are unknown')
        if config.loss == "graddiff" and not retain:
            raise ValueError('[UnlearnTrainer] expected retain examples for loss "graddiff", got none')
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate, **options)
        # compute_loss divides by the optimizer step's examples; this keeps the Trainer from dividing by micro-batches
        self.model_accepts_loss_kwargs = True
        self.config = config
        self.retain: list[Example] = [example_of(row) for row in retain or ()]
        self.reference = reference
        if reference is None and (config.proximal or (self.retain and config.retain_loss == "kl")):
            self.reference = ParameterSnapshot(model)
        if self.reference is not None:
            self.reference.to(args.device)
        self.nll_reference: Tensor | None = None
        if config.loss == "npo":
            self.nll_reference = self._nll_reference(model, train_dataset, nll_reference)
        step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._draw = RetainSampler(len(self.retain), config.retain_batch_size or step_size, args.seed)
        self._parts: dict[str, Tensor] = {}

    def _nll_reference(self, model: nn.Module, rows: Any, given: Sequence[float] | Tensor | None) -> Tensor:
        if given is None:
            examples = [rows[i] for i in range(len(rows))]
            return nlls(model, examples, reduction=self.config.reduction, reference=self.reference)
        values = torch.as_tensor(given, dtype=torch.float64)
        if values.shape != (len(rows),):
            raise ValueError(
                f"[UnlearnTrainer] expected nll_reference of shape ({len(rows)},), got {tuple(values.shape)}"
            )
        return values

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, int]:
        """The micro-batches of one optimizer step, each with its share of the step's positives, and the step's size."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        positives = self._draw(self.state.global_step) if self.retain and self.config.retain_weight else []
        for i, batch in enumerate(batches):
            cut = slice(i * len(positives) // len(batches), (i + 1) * len(positives) // len(batches))
            batch["retain"] = torch.tensor(positives[cut], dtype=torch.int64)
            batch["is_first"] = torch.tensor(i == 0)
        self._parts = {}
        return batches, sum(len(batch["weight"]) for batch in batches)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the optimizer step's loss, so that the shares add up to it.

        ``num_items_in_batch`` is the number of negatives of the optimizer step; None: this batch is all of it.
        """
        parts = {"forget_loss": self._forget(model, inputs) / (num_items_in_batch or len(inputs["weight"]))}
        if self.config.proximal and inputs.get("is_first", True):
            assert self.reference is not None
            parts["proximal_loss"] = self.config.proximal * self.reference.squared_distance(model)
        positions = inputs["retain"].tolist() if "retain" in inputs else []
        if positions:
            parts["retain_loss"] = self.config.retain_weight * self._retain(model, positions)
        loss = torch.stack([part.to(parts["forget_loss"]) for part in parts.values()]).sum()
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {part.item():g}" for name, part in parts.items())
            raise FloatingPointError(
                f"[unlearn] the loss is not finite at step {self.state.global_step + 1} ({values}; negatives "
                f"{inputs['index'].tolist()}): lower learning_rate, or bound the loss with max_drift or loss npo"
            )
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + part.detach()
        return (loss, {}) if return_outputs else loss

    def _forget(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        nll = -sequence_logprobs(model, unpad(inputs), reduction=self.config.reduction)
        at_reference = None
        if self.nll_reference is not None:
            at_reference = self.nll_reference[inputs["index"].cpu()].to(nll)
        phi = unlearning_loss(self.config.loss, nll, at_reference, self.config.npo_beta)
        return inputs["weight"].to(phi) @ phi

    def _retain(self, model: nn.Module, positions: Sequence[int]) -> Tensor:
        losses = retain_losses(
            model,
            [self.retain[i] for i in positions],
            loss=self.config.retain_loss,
            reduction=self.config.reduction,
            reference=self.reference,
        )
        return losses.sum() / self._draw.batch_size

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the last optimizer step's loss to what is logged."""
        if "loss" in logs:
            logs = {**logs, **{name: part.item() for name, part in self._parts.items()}}
        super().log(logs, *args, **kwargs)
