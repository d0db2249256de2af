"""kronfluence: pairwise scores of linear layers with the identity as curvature."""

import tempfile
from collections.abc import Sequence

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as KronfluenceTask
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from benchmarks.peers.task import Batch, Example, Scorer, Task, batches, linears, mean_nll

HALVED = ("score", "per_sample_gradient", "precondition")


def identity(task: Task) -> Scorer:
    """The query is the sum of the other examples' gradients, which it computes anew in every run."""
    folder = tempfile.TemporaryDirectory()
    names, dtype = list(linears(task.model)), task.model.dtype

    # its own choice for half precision, less the autocast that a model in half precision does not need
    half = {} if dtype == torch.float32 else {f"{what}_dtype": dtype for what in HALVED}

    # user code: identity
    class LanguageModeling(KronfluenceTask):
        def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
            return mean_nll(model(batch[0], use_cache=False).logits, batch[1]).sum()

        def compute_measurement(self, batch: tuple, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model) / len(task.others)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    rules = LanguageModeling()
    model = prepare_model(task.model, rules)
    analyzer = Analyzer("peers", model, rules, cpu=task.device == "cpu", output_dir=folder.name, disable_tqdm=True)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_padded))
    analyzer.fit_all_factors("identity", [], factor_args=FactorArguments(strategy="identity"))

    def pairwise(examples: Sequence[Example]) -> Tensor:
        analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            query_dataset=task.others,
            train_dataset=examples,
            per_device_query_batch_size=len(task.others),
            per_device_train_batch_size=task.batch,
            score_args=ScoreArguments(aggregate_query_gradients=True, **half),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"][0]

    # end
    def score(examples: Sequence[Example]) -> Tensor:
        order = [i for batch in batches(examples, task.batch) for i in batch.positions]
        out = torch.empty(len(examples))
        out[order] = pairwise([examples[i] for i in order]).float().cpu()
        return out

    shortest = min(task.examples, key=lambda example: len(example["input_ids"]))
    score.query = lambda: pairwise([shortest])
    score.folder = folder  # as long as the scorer lives
    return score


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    (batch,) = batches(examples, size=len(examples))
    restored = torch.tensor(batch.positions).argsort()
    return Batch(batch.positions, batch.input_ids[restored], batch.labels[restored])[1:]
