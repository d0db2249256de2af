"""What every contestant gets: a model, tokenized negatives and the direction.

On the CPU all are written once and read by each. On a device the model is large, so that what is written of it is how
to make it from a seed, and its direction with it.

Examples are sorted by length and padded on the right, which a causal model needs no mask for: padding costs time, and
changes no score.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["BATCH", "Batch", "Example", "Recipe", "Scorer", "Task", "batches", "linears", "mean_nll", "ordered"]

BATCH = 8
IGNORE_INDEX = -100

Example = dict[str, list[int]]
Scorer = Callable[[Sequence[Example]], Tensor]  # scores (N) in the order of the examples


class Batch(NamedTuple):
    """Positions of its B examples in the list, and their ids and labels (B, T), padded."""

    positions: list[int]
    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Recipe:
    """How to make a model of random weights: its config with a ``model_type``, a torch dtype's name and a device."""

    config: dict[str, Any]
    dtype: str
    device: str

    def model(self) -> nn.Module:
        """The model in evaluation mode; the same in every process on the same device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            config = AutoConfig.for_model(**self.config)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype)).eval()

    def task(self, examples: list[Example], others: list[Example], batch: int) -> "Task":
        """The task on the device; its direction is a float32 gradient in the model's dtype."""
        model = self.model()
        return Task(model, examples, others, _gradient(model, others, self.device), self.device, batch, self)


@dataclass
class Task:
    """<direction, grad NLL_i> of every example i, NLL_i the mean over its answer tokens.

    The direction is the gradient of the mean NLL of ``others``, so that a method that takes examples for its query
    computes the same scores as one that takes a direction. Batches are of ``batch`` examples where their user chooses.
    """

    model: nn.Module
    examples: list[Example]
    others: list[Example]
    direction: dict[str, Tensor]
    device: str = "cpu"
    batch: int = BATCH
    recipe: Recipe | None = None

    def save(self, folder: Path) -> None:
        """Write it below ``folder``: a recipe in place of the model and the direction where there is one."""
        written = folder / "recipe.json"
        written.unlink(missing_ok=True)
        if self.recipe is not None:
            written.write_text(json.dumps({"recipe": asdict(self.recipe), "batch": self.batch}), encoding="utf-8")
        else:
            self.model.save_pretrained(folder / "model")
            save_file({name: v.contiguous() for name, v in self.direction.items()}, folder / "direction.safetensors")
        for what, examples in (("examples", self.examples), ("others", self.others)):
            save_file(_flat(examples), folder / f"{what}.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Task":
        """The same in another process, in evaluation mode; float32 where no recipe says otherwise."""
        lists = {what: _split(load_file(folder / f"{what}.safetensors")) for what in ("examples", "others")}
        if (written := folder / "recipe.json").exists():
            found = json.loads(written.read_text(encoding="utf-8"))
            return Recipe(**found["recipe"]).task(**lists, batch=found["batch"])
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        found = load_file(folder / "direction.safetensors")
        direction = {name: found[name] for name, _ in model.named_parameters()}
        return cls(model, direction=direction, **lists)


def _gradient(model: nn.Module, others: Sequence[Example], device: str) -> dict[str, Tensor]:
    """The gradient of the mean NLL, computed in float32 whatever the model's dtype, by parameter name."""
    single = copy.deepcopy(model).float()
    for _, ids, labels in batches(others, len(others)):
        mean_nll(single(ids.to(device), use_cache=False).logits, labels.to(device)).mean().backward()
    found = {}
    for (name, p), own in zip(single.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        found[name], p.grad = p.grad.to(own.dtype), None
    return found


def _flat(examples: Sequence[Example]) -> dict[str, Tensor]:
    flat = {key: torch.tensor([i for e in examples for i in e[key]]) for key in ("input_ids", "labels")}
    return flat | {"lengths": torch.tensor([len(e["input_ids"]) for e in examples])}


def _split(flat: dict[str, Tensor]) -> list[Example]:
    lengths = flat["lengths"].tolist()
    ids, labels = (flat[key].split(lengths) for key in ("input_ids", "labels"))
    return [{"input_ids": i.tolist(), "labels": n.tolist()} for i, n in zip(ids, labels, strict=True)]


def batches(examples: Sequence[Example], size: int = BATCH) -> Iterator[Batch]:
    """Longest first, ``size`` examples at a time."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    for start in range(0, len(order), size):
        positions = order[start : start + size]
        ids, labels = ([torch.tensor(examples[i][key]) for i in positions] for key in ("input_ids", "labels"))
        padded = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        yield Batch(positions, pad_sequence(ids, batch_first=True), padded)


def ordered(
    task: Task, examples: Sequence[Example], score: Callable[[Tensor, Tensor], Tensor], size: int | None = None
) -> Tensor:
    """``score(input_ids, labels)`` (B) of every batch, in the order of the examples; ``task.batch`` at a time."""
    order: list[int] = []
    found = []  # fetched at the end: a device need not wait for the host between batches
    for positions, ids, labels in batches(examples, size or task.batch):
        order += positions
        found.append(score(ids.to(task.device), labels.to(task.device)).detach().reshape(-1))
    out = torch.empty(len(examples), dtype=torch.float64)
    out[order] = torch.cat(found).double().cpu()
    return out


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood (B) of the labels (B, T) that are not -100 under logits (B, T, V).

    That of half-precision logits is computed in float32, as transformers does.
    """
    targets = labels[:, 1:]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).sum(1) / (targets != IGNORE_INDEX).sum(1)


def linears(model: Any) -> dict[str, nn.Linear]:
    """Linear layers below the head, by name in the whole model: what the peers that hook layers track."""
    inside = {id(module) for module in model.base_model.modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
