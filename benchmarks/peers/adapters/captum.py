"""captum: TracInCPFast, which looks at the last linear layer alone."""

from collections.abc import Sequence

import torch
from captum.influence import TracInCPFast
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peers.task import IGNORE_INDEX, Batch, Example, Scorer, Task, batches


def last_layer(task: Task) -> Scorer:
    """Every answer token is an example to captum, weighted by one over its answer's length.

    It computes the query anew for every batch, so batches are large.
    """
    (others,) = batches(task.others, size=len(task.others))

    # user code: last_layer
    class AnswerTokens(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.body, self.head = model.base_model, model.get_output_embeddings()

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return self.head(self.body(ids, use_cache=False).last_hidden_state[:, :-1][labels[:, 1:] != IGNORE_INDEX])

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return (nn.functional.cross_entropy(logits, targets[:, 0].long(), reduction="none") * targets[:, 1]).sum()

    def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        answers = (labels := batch.labels)[:, 1:] != IGNORE_INDEX
        weights = (answers / answers.sum(1, keepdim=True))[answers]
        return batch.input_ids, labels, torch.stack([labels[:, 1:][answers].double(), weights.double()], 1)

    model = AnswerTokens(task.model)
    query = inputs(others)

    def score(examples: Sequence[Example]) -> Tensor:
        groups = list(batches(examples, size=32))
        loader = DataLoader([inputs(batch) for batch in groups], batch_size=None)
        tracin = TracInCPFast(model, model.head, loader, [""], lambda *_: 1.0, loss)
        tokens = tracin.influence(query).sum(0) / len(task.others)
        counts = [n for batch in groups for n in (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()]
        out = torch.empty(len(examples))
        out[[i for batch in groups for i in batch.positions]] = torch.stack([t.sum() for t in tokens.split(counts)])
        return out

    # end
    return score
