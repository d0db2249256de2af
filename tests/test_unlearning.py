"""Unlearning losses, the trainer's arithmetic, resuming, PEFT, the drift guard and failures, on tiny float64 models."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, examples, own_nll
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from u2a_fast.losses import unlearning_loss, unlearning_slope
from u2a_fast.unlearning import UnlearnConfig, UnlearnTrainer, WeightedNegatives, retain, unlearn
from u2a_fast.unlearning.batches import collate, unpad
from u2a_fast.unlearning.drift import _forecast
from u2a_fast.unlearning.retain import RetainSampler, retain_losses
from u2a_fast.unlearning.run import train
from u2a_fast.unlearning.snapshot import ParameterSnapshot

EPS = torch.finfo(torch.float64).eps
CLOSE = {"rtol": EPS**0.5, "atol": EPS**0.75}  # float64 through a whole model, summed in another order
NEGATIVES = examples(11)
POSITIVES = examples(5, seed=7)
WEIGHTS = [0.0, 0.5, 1.0, 1.5, 2.0, 0.25, 1.0, 3.0, 0.1, 1.0, 0.65]
PLAIN = UnlearnConfig(proximal=0.0, max_grad_norm=0.0, max_drift=None, learning_rate=1e-3, batch_size=4)


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)


def lora(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=4)).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trainer(model: nn.Module, config: UnlearnConfig, tmp_path: Path, **options: Any) -> UnlearnTrainer:
    args = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), remove_unused_columns=False, report_to="none", use_cpu=True
    )
    return UnlearnTrainer(model, args, WeightedNegatives(NEGATIVES, WEIGHTS), config=config, **options)


def loss_of(model: nn.Module, config: UnlearnConfig, tmp_path: Path, rows: list[int], **options: Any) -> Tensor:
    t = trainer(model, config, tmp_path, **options)
    return t.compute_loss(model, collate([t.train_dataset[i] for i in rows]))


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("name", ["ga", "npo", "graddiff"])
def test_the_slope_is_the_derivative_of_the_loss(name: str) -> None:
    x = torch.linspace(-30, 30, 13, dtype=torch.float64, requires_grad=True)
    reference = torch.linspace(3, -3, 13, dtype=torch.float64)
    for beta in (0.05, 2.0):
        (slope,) = torch.autograd.grad(unlearning_loss(name, x, reference, beta).sum(), x)
        torch.testing.assert_close(unlearning_slope(name, x.detach(), reference, beta), slope, rtol=8 * EPS, atol=EPS)


def test_npo_starts_as_gradient_ascent_and_tends_to_it() -> None:
    x = torch.tensor([0.5, 3.0], dtype=torch.float64)
    assert unlearning_slope("npo", x, x, 0.3).tolist() == [-1.0, -1.0]
    shift = unlearning_loss("npo", x, torch.zeros(2), 1e-6) - 2e6 * math.log(2)
    torch.testing.assert_close(shift, -x, rtol=0, atol=1e-5)  # beta x^2 / 4 and the rounding of 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sft", torch.zeros(1)), "expected one of"),
        (("npo", torch.zeros(1)), "expected nll_ref"),
        (("npo", torch.zeros(2), torch.zeros(1)), "of shape"),
        (("npo", torch.zeros(1), torch.zeros(1), 0.0), "beta > 0"),
    ],
)
def test_loss_mistakes_are_named(arguments: tuple, message: str) -> None:
    for function in (unlearning_loss, unlearning_slope):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_collation_keeps_weights_and_needs_no_pad_token() -> None:
    rows = [{**e, "weight": w, "index": i} for i, (e, w) in enumerate(zip(NEGATIVES, WEIGHTS, strict=True))]
    rows[1]["input_ids"][-1] = 0  # a real token with the id that padding happens to have
    batch = collate(rows)
    assert batch["weight"].tolist() == WEIGHTS and batch["index"].tolist() == list(range(11))
    for example, row in zip(unpad(batch), rows, strict=True):
        assert example["input_ids"].tolist() == row["input_ids"] and example["labels"].tolist() == row["labels"]


@pytest.mark.parametrize("loss", ["ga", "npo"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_in_w_has_each_examples_own_loss_as_slope(loss: str, reduction: str, tmp_path: Path) -> None:
    model, rows = build("llama"), list(range(11))
    config = replace(PLAIN, loss=loss, reduction=reduction)
    t = trainer(model, config, tmp_path, nll_reference=[2.0] * 11)
    batch = collate([t.train_dataset[i] for i in rows])
    batch["weight"].requires_grad_()
    (slope,) = torch.autograd.grad(t.compute_loss(model, batch), batch["weight"])
    nll = torch.stack([own_nll(model, e, reduction) for e in NEGATIVES]).detach()
    expected = unlearning_loss(loss, nll, torch.full((11,), 2.0, dtype=torch.float64), config.npo_beta) / 11
    torch.testing.assert_close(slope, expected, **CLOSE)


def test_a_zero_weight_has_no_influence_and_weights_act_one_by_one(tmp_path: Path) -> None:
    model, config = build("llama"), replace(PLAIN, loss="npo")
    options = {"nll_reference": [3.0] * 11}
    both = gradients(loss_of(model, config, tmp_path, [0, 7], **options), model)
    alone = gradients(loss_of(model, config, tmp_path, [7], **options), model)
    for pair, single in zip(both, alone, strict=True):
        torch.testing.assert_close(2 * pair, single, **CLOSE)


def test_npo_at_the_reference_has_the_gradient_of_gradient_ascent(tmp_path: Path) -> None:
    model, rows = build("llama"), [1, 3, 4]
    npo = gradients(loss_of(model, replace(PLAIN, loss="npo"), tmp_path, rows), model)
    ga = gradients(loss_of(model, PLAIN, tmp_path, rows), model)
    for a, b in zip(npo, ga, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_npo_reference_is_the_snapshot_not_the_model_of_now(tmp_path: Path) -> None:
    model = build("llama")
    start = ParameterSnapshot(model)
    expected = [own_nll(model, e).item() for e in NEGATIVES]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    t = trainer(model, replace(PLAIN, loss="npo"), tmp_path, reference=start)
    torch.testing.assert_close(t.nll_reference, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_the_proximal_term_pulls_towards_theta_0(tmp_path: Path) -> None:
    model = build("llama")
    start = ParameterSnapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    near = loss_of(model, replace(PLAIN, proximal=0.7), tmp_path, [1, 2], reference=start)
    far = loss_of(model, PLAIN, tmp_path, [1, 2])
    distance = sum((p - start.values[name]).square().sum() for name, p in model.named_parameters())
    torch.testing.assert_close(near - far, 0.7 * distance, **CLOSE)
    pull = [a - b for a, b in zip(gradients(near, model), gradients(far, model), strict=True)]
    for difference, (name, p) in zip(pull, model.named_parameters(), strict=True):
        torch.testing.assert_close(difference, 1.4 * (p - start.values[name]).detach(), **CLOSE)


def kl_by_definition(model: nn.Module, start: nn.Module, example: dict[str, list[int]]) -> Tensor:
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
    scored = labels[1:] != -100
    logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[scored]
    with torch.no_grad():
        expected = start(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[scored]
    return (expected.exp() * (expected - logp)).sum(-1).mean()


@pytest.mark.parametrize(
    "make", [lambda: build("llama"), lambda: build("llama-tied"), lora], ids=["full", "tied", "lora"]
)
def test_kl_retain_is_the_divergence_from_theta_0_whatever_the_chunks(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start = make(), make()
    snapshot = ParameterSnapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    moved = trainable(model)
    expected = torch.stack([kl_by_definition(model, start, e) for e in POSITIVES])
    wanted = gradients(expected.sum(), model)
    for size in (61, 61 * 7, 2**24):  # one token at a time, seven, all
        monkeypatch.setattr(retain, "_LOGITS", size)
        losses = retain_losses(model, POSITIVES, loss="kl", reduction="mean", reference=snapshot)
        torch.testing.assert_close(losses, expected, **CLOSE)
        for a, b in zip(gradients(losses.sum(), model), wanted, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    for name, value in trainable(model).items():
        assert torch.equal(value, moved[name])


def test_retain_draws_depend_on_the_step_alone_and_visit_all() -> None:
    draw = RetainSampler(7, 3, seed=5)
    steps = [draw(step) for step in range(7)]
    assert [draw(step) for step in reversed(range(7))] == steps[::-1]
    flat = sum(steps, [])
    assert [sorted(flat[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert RetainSampler(7, 3, seed=6)(0) != steps[0] or RetainSampler(7, 3, seed=6)(1) != steps[1]


def test_every_step_draws_its_own_retain_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    retain_part = UnlearnTrainer._retain

    def spy(self: UnlearnTrainer, model: nn.Module, positions: list[int]) -> Tensor:
        seen.append(positions)
        return retain_part(self, model, positions)

    monkeypatch.setattr(UnlearnTrainer, "_retain", spy)
    config = replace(PLAIN, loss="graddiff", retain_batch_size=3, micro_batch_size=2, seed=4)
    train(build("llama"), NEGATIVES, WEIGHTS, config=config, folder=tmp_path, retain=POSITIVES)
    draw = RetainSampler(5, 3, seed=4)
    assert seen == [part for step in range(3) for part in (draw(step)[:1], draw(step)[1:])]


TERMS = replace(PLAIN, loss="graddiff", proximal=0.05, retain_batch_size=3, epochs=2, max_grad_norm=1.0)


@pytest.mark.parametrize(
    "config", [TERMS, replace(TERMS, loss="npo", retain_loss="kl")], ids=["graddiff-nll", "npo-kl"]
)
def test_updates_do_not_depend_on_the_micro_batches(config: UnlearnConfig, tmp_path: Path) -> None:
    # 11 negatives in steps of 4: each epoch ends in a ragged step of 3
    reference = ParameterSnapshot(build("llama", seed=1))  # away from the start, where the KL term has no gradient
    ends = []
    for micro in (4, 2, 1):
        model = build("llama")
        split = replace(config, micro_batch_size=micro)
        outcome = train(model, NEGATIVES, WEIGHTS, config=split, folder=tmp_path, retain=POSITIVES, reference=reference)
        assert outcome.steps == 6
        ends.append(trainable(model))
    for other in ends[1:]:
        for name, value in ends[0].items():
            # AdamW divides a gradient by its size, or by 1e-8: rounding of 1e-16 becomes up to 1e-11 a step, then grows
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


def test_a_ragged_step_divides_by_its_own_examples(tmp_path: Path) -> None:
    # plain SGD on one ragged step shows the gradient itself: three negatives in micro-batches of two and one
    config = replace(PLAIN, batch_size=4, micro_batch_size=2)
    model = build("llama")
    expected = gradients(loss_of(model, PLAIN, tmp_path, [0, 1, 2]), model)
    args = TrainingArguments(
        output_dir=str(tmp_path / "t"),
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    before = [p.detach().clone() for p in model.parameters()]
    UnlearnTrainer(model, args, WeightedNegatives(NEGATIVES[:3], WEIGHTS[:3]), config=config).train()
    for p, start, grad in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(start - p.detach(), 0.1 * grad, **CLOSE)


class CutOff(Exception):
    pass


class CutOffAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise CutOff


def cut_off_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = UnlearnTrainer.__init__

    def patched(self: UnlearnTrainer, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.add_callback(CutOffAt(step))

    monkeypatch.setattr(UnlearnTrainer, "__init__", patched)


@pytest.mark.parametrize("make", [lambda: build("gpt2"), lora], ids=["dropout", "lora"])
def test_a_run_that_was_cut_off_ends_as_an_uninterrupted_one(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TERMS, loss="npo", retain_loss="kl", micro_batch_size=2, save_every=2, max_drift=50.0)
    whole = make()
    unlearn(whole, None, NEGATIVES, WEIGHTS, config=config, retain=POSITIVES, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        cut_off_at(5, patch)
        unlearn(make(), None, NEGATIVES, WEIGHTS, config=config, retain=POSITIVES, output_dir=tmp_path / "cut")
    assert not (tmp_path / "cut" / "model").exists()
    broken = tmp_path / "cut" / "checkpoints" / "checkpoint-9"  # as kill -9 in the middle of saving leaves it
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 9, ')
    again = make()
    steps: list[int] = []
    unlearn(
        again,
        None,
        NEGATIVES,
        WEIGHTS,
        config=config,
        retain=POSITIVES,
        output_dir=tmp_path / "cut",
        on_progress=lambda done, total: steps.append(done),
    )
    assert steps == [5, 6]
    for name, value in trainable(whole).items():
        assert torch.equal(trainable(again)[name], value), name
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_checkpoints_of_another_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(PLAIN, save_every=1)
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        cut_off_at(2, patch)
        unlearn(build("llama"), None, NEGATIVES, WEIGHTS, config=config, output_dir=tmp_path)
    with pytest.raises(ValueError, match="another config, weights"):
        changed = replace(config, learning_rate=1.0)
        unlearn(build("llama"), None, NEGATIVES, [1.0] * 11, config=changed, output_dir=tmp_path)


def test_only_adapters_are_trained_and_saved(tmp_path: Path) -> None:
    model = lora()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = trainable(model)
    unlearn(model, None, NEGATIVES, WEIGHTS, config=replace(PLAIN, proximal=0.1), output_dir=tmp_path)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())
    assert all(not torch.equal(trainable(model)[name], value) for name, value in before.items())
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_the_saved_model_is_the_unlearned_one(tmp_path: Path) -> None:
    model = build("llama")
    before = trainable(model)
    result = unlearn(model, None, NEGATIVES, WEIGHTS, config=PLAIN, output_dir=tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float64)
    for name, value in trainable(model).items():
        assert torch.equal(dict(saved.named_parameters())[name], value)
        assert not torch.equal(before[name], value)
    assert not model.training
    nll = torch.stack([own_nll(model, e) for e in NEGATIVES]).mean().item()
    assert result.nll_after == pytest.approx(nll, rel=EPS**0.5) and result.drift > 0


def test_the_drift_guard_ends_before_the_limit(tmp_path: Path) -> None:
    config = replace(PLAIN, learning_rate=2e-4, max_steps=90, drift_every=5)
    free = unlearn(build("llama"), None, NEGATIVES, [1.0] * 11, config=config, output_dir=tmp_path / "free")
    held_config = replace(config, max_drift=0.5)
    held = unlearn(build("llama"), None, NEGATIVES, [1.0] * 11, config=held_config, output_dir=tmp_path / "held")
    assert free.steps == 90 and not free.stopped_by_drift and free.drift > 1
    assert held.stopped_by_drift and held.steps < 90
    assert 0.4 < held.drift <= 0.5
    looks = [row["step"] for row in held.history if "drift" in row]
    assert len(looks) < held.steps / 2 and looks[:3] == [1, 6, 11]


def test_a_loss_that_is_not_finite_ends_with_a_clear_error(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite at step 1 \(forget_loss nan; negatives \["):
        unlearn(model, None, NEGATIVES, WEIGHTS, config=PLAIN, output_dir=tmp_path)
    assert not (tmp_path / "model").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = build("llama")
    for options, message in (
        ({"loss": "dpo"}, "expected loss out of"),
        ({"batch_size": 4, "micro_batch_size": 3}, "micro_batch_size dividing batch_size = 4"),
        ({"learning_rate": 0.0}, "expected learning_rate > 0"),
        ({"max_drift": 0.0}, "expected max_drift > 0 or None"),
    ):
        with pytest.raises(ValueError, match=message):
            UnlearnConfig(**options)
    for weights, message in (([1.0], "as many weights"), ([-1.0] * 11, "weights >= 0"), ([math.nan] * 11, "finite")):
        with pytest.raises(ValueError, match=message):
            unlearn(model, None, NEGATIVES, weights, config=PLAIN, output_dir=tmp_path)
    with pytest.raises(ValueError, match='expected retain examples for loss "graddiff"'):
        unlearn(model, None, NEGATIVES, WEIGHTS, config=replace(PLAIN, loss="graddiff"), output_dir=tmp_path)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        UnlearnTrainer(model, args, WeightedNegatives(NEGATIVES, WEIGHTS), config=PLAIN)
    args = TrainingArguments(
        output_dir=str(tmp_path), remove_unused_columns=False, report_to="none", use_cpu=True, bf16=True
    )
    with pytest.raises(ValueError, match="autocast does not reach the packed forward pass"):
        UnlearnTrainer(model, args, WeightedNegatives(NEGATIVES, WEIGHTS), config=PLAIN)
    with pytest.raises(ValueError, match='expected no eval_dataset for loss "npo"'):
        rows = WeightedNegatives(NEGATIVES, WEIGHTS)
        trainer(model, replace(PLAIN, loss="npo"), tmp_path, eval_dataset=rows)


def test_kl_retain_repeats_its_dropout_and_spares_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout in the head's adapter: chunks recompute with the masks they had, and the reference has none."""
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(build("llama"), config).double().train()
    reference = ParameterSnapshot(model)

    def one() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(7)
        losses = retain_losses(model, NEGATIVES[:3], loss="kl", reduction="mean", reference=reference)
        return losses, gradients(losses.sum(), model)

    losses, grads = one()
    monkeypatch.setattr(retain, "checkpoint", lambda function, *args, **options: function(*args))
    direct_losses, direct = one()
    torch.testing.assert_close(losses, direct_losses)
    torch.testing.assert_close(grads, direct)
    assert (losses > 1e-6).all(), "the model's own dropout moves it away from the reference"
    model.eval()
    assert one()[0].abs().max() < 1e-12


def test_the_forecast_is_exact_on_parabolas_and_never_slows_down() -> None:
    def rise(step: int) -> float:
        return 0.01 * step + 0.003 * step**2

    assert _forecast([(0, 0.0), (1, 0.2)], 3) == pytest.approx(0.8)
    assert _forecast([(s, rise(s)) for s in (0, 1, 6)], 5) == pytest.approx(rise(11))
    assert _forecast([(s, rise(s)) for s in (4, 6, 7)], 1) == pytest.approx(rise(8))
    assert _forecast([(0, 0.0), (1, 0.2), (2, 0.3)], 1) == pytest.approx(0.4)
    assert _forecast([(0, 0.0), (1, 0.2), (2, 0.1)], 5) == pytest.approx(0.1)
