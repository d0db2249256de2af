"""bergson: its gradient scorer, unprojected and with two-sided projections, and its forward-mode token influence.

All three take the direction as the query gradient, keep scores in memory, and pack batches by bergson's own rule.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bergson import GradientCollector, GradientProcessor, IndexConfig, collect_gradients
from bergson import Scorer as BergsonScorer
from bergson.collector.collector import create_module_projection_matrix
from bergson.data import allocate_batches, pad_and_tensor
from bergson.score.output_influence import output_token_influence, query_directions
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset
from torch import Tensor

from benchmarks.peers.task import Example, Scorer, Task

TOKENS = 2048


def _tokens(task: Task, examples: Sequence[Example]) -> int:
    return TOKENS if task.recipe is None else task.batch * max(len(e["input_ids"]) for e in examples)


def _frozen(task: Task) -> tuple:
    # user code: unprojected projected output
    model, base = task.model.requires_grad_(False), f"{task.model.base_model_prefix}."
    model.get_input_embeddings().requires_grad_(True)
    targets = GradientCollector.discover_targets(model.base_model)
    query = {name: task.direction[f"{base}{name}.weight"] for name in targets}
    # end
    return model, targets, query


def _gradients(task: Task, dimension: int) -> Scorer:
    model, targets, query = _frozen(task)
    folder = tempfile.TemporaryDirectory()
    # user code: projected
    processor = GradientProcessor(projection_dim=dimension or None)
    sides = (processor.projection_type, processor.projection_scale, processor.projection_seed)
    where = model.dtype, model.device
    for name, v in query.items() if dimension else ():
        left = create_module_projection_matrix(name, "left", dimension, v.shape[0], *where, *sides)
        right = create_module_projection_matrix(name, "right", dimension, v.shape[1], *where, *sides)
        query[name] = left @ v @ right.T
    # end

    # user code: unprojected projected
    path = str(Path(folder.name) / "run")
    settings = IndexConfig(path, projection_dim=dimension, loss_reduction="mean", token_batch_size=TOKENS)
    settings.partial_run_path.mkdir(parents=True, exist_ok=True)
    flat = {name: v.flatten()[None] for name, v in query.items()}

    def score(examples: Sequence[Example]) -> Tensor:
        writer = InMemorySequenceScoreWriter(len(examples), 1)
        scorer = BergsonScorer(flat, list(flat), writer, model.device, model.dtype)
        batches = allocate_batches([len(e["input_ids"]) for e in examples], _tokens(task, examples))
        data = Dataset.from_list(examples)
        collect_gradients(model, data, processor, settings, batches=batches, target_modules=set(targets), scorer=scorer)
        return writer.scores[:, 0]

    # end
    score.folder = folder  # as long as the scorer lives
    return score


def unprojected(task: Task) -> Scorer:
    """Per-example gradients of every linear, materialised, times the query."""
    return _gradients(task, 0)


def projected(task: Task) -> Scorer:
    """The same through its random projections to 16 by 16 a module, the default dimension of its examples."""
    return _gradients(task, 16)


def output(task: Task) -> Scorer:
    """``token_influence="output"``: torch.func.jvp of token losses with eager attention."""
    model, targets, query = _frozen(task)
    # user code: output
    model.set_attn_implementation("eager")
    directions = query_directions(model, {name: v.flatten()[:, None] for name, v in query.items()}, targets)
    settings = IndexConfig(run_path="unused", loss_reduction="mean")

    def score(examples: Sequence[Example]) -> Tensor:
        out = torch.empty(len(examples))
        for positions in allocate_batches([len(e["input_ids"]) for e in examples], _tokens(task, examples)):
            ids, labels = ([examples[i][key] for i in positions] for key in ("input_ids", "labels"))
            x, y, *_ = pad_and_tensor(ids, labels=labels, device=model.device, sync_max_len=False)
            out[positions] = output_token_influence(model, x, y, directions, settings)[0].sum(1)[:, 0].cpu()
        return out

    # end
    return score
