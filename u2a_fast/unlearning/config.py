"""What an unlearning run is told to do."""

from dataclasses import dataclass, field

from u2a_fast.losses import UNLEARNING_LOSSES
from u2a_fast.selection import STRATEGIES, TRANSFORMS, WEIGHTS

__all__ = ["AlignConfig", "UnlearnConfig"]

RETAIN_LOSSES = ("nll", "kl")


def _expect(condition: bool, owner: str, what: str, value: object) -> None:
    if not condition:
        raise ValueError(f"[{owner}] expected {what}, got {value!r}")


@dataclass(frozen=True)
class UnlearnConfig:
    """Weighted unlearning: mean over an optimizer step's examples of w_i phi(NLL_i), + proximal + retain.

    Attributes:
        loss: phi, ``"ga"``, ``"npo"`` or ``"graddiff"`` (``"ga"`` that insists on a retain set).
        npo_beta: NPO's inverse temperature, 1/nats.
        reduction: NLL_i is the ``"mean"`` or the ``"sum"`` over example i's scored tokens.
        proximal: lambda of lambda ||theta - theta_0||^2 over the trainable parameters, per squared parameter unit.
        retain_loss: ``"nll"`` of positives, or ``"kl"``, KL(theta_0 || theta) at their scored tokens, both reduced over
            tokens as ``reduction`` says and averaged over examples.
        retain_weight: factor on the retain loss.
        retain_batch_size: positives an optimizer step; None: as many as ``batch_size``.
        learning_rate: AdamW's, in parameter units a step.
        weight_decay: AdamW's decoupled decay, 1/(learning rate * steps).
        max_grad_norm: gradient norm at which a step's gradient is clipped; 0: never.
        batch_size: negatives an optimizer step.
        micro_batch_size: negatives in memory at once, a divisor of ``batch_size``; None: all of them.
        epochs: passes over the negatives, unless ``max_steps`` is given.
        max_steps: optimizer steps; None: as ``epochs`` says.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: learning rate schedule by transformers' name: ``"constant_with_warmup"``, ``"linear"``, ``"cosine"``.
        max_drift: rise of the chosen negatives' mean NLL at which unlearning ends, in nats (per token for ``"mean"``
            reduction, per answer for ``"sum"``); None: no guard.
        drift_every: optimizer steps between two looks at the drift.
        drift_sample: negatives that the drift is measured on.
        save_every: optimizer steps between checkpoints; None: none.
        seed: of batch order, retain draws, dropout and the drift sample.
    """

    loss: str = "ga"
    npo_beta: float = 0.1
    reduction: str = "mean"
    proximal: float = 0.1
    retain_loss: str = "nll"
    retain_weight: float = 1.0
    retain_batch_size: int | None = None
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    micro_batch_size: int | None = None
    epochs: int = 1
    max_steps: int | None = None
    warmup_steps: int = 0
    schedule: str = "constant_with_warmup"
    max_drift: float | None = 1.0
    drift_every: int = 5
    drift_sample: int = 64
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        _expect(self.loss in UNLEARNING_LOSSES, name, f"loss out of {list(UNLEARNING_LOSSES)}", self.loss)
        _expect(self.reduction in ("mean", "sum"), name, 'reduction "mean" or "sum"', self.reduction)
        _expect(self.retain_loss in RETAIN_LOSSES, name, f"retain_loss out of {list(RETAIN_LOSSES)}", self.retain_loss)
        for key in ("npo_beta", "learning_rate"):
            _expect(getattr(self, key) > 0, name, f"{key} > 0", getattr(self, key))
        for key in ("proximal", "retain_weight", "weight_decay", "max_grad_norm", "warmup_steps"):
            _expect(getattr(self, key) >= 0, name, f"{key} >= 0", getattr(self, key))
        for key in ("batch_size", "epochs", "drift_every", "drift_sample"):
            _expect(getattr(self, key) >= 1, name, f"{key} >= 1", getattr(self, key))
        for key in ("retain_batch_size", "micro_batch_size", "max_steps", "max_drift", "save_every"):
            value = getattr(self, key)
            _expect(value is None or value > 0, name, f"{key} > 0 or None", value)
        micro = self.micro_batch_size or self.batch_size
        _expect(self.batch_size % micro == 0, name, f"micro_batch_size dividing batch_size = {self.batch_size}", micro)


@dataclass(frozen=True)
class AlignConfig:
    """The U2A loop: rounds of score, select, weigh, unlearn.

    Attributes:
        rounds: most rounds.
        unlearn: one round's unlearning; its loss, ``npo_beta`` and ``reduction`` are also those of the scores.
        strategy, k, threshold, token_budget: which negatives a round takes, as ``select`` does.
        weights: ``"uniform"``, ``"eg"`` (a round steps on from the weights of the round before) or ``"eg-released"``.
        eta: step size of the weights a round; None: as ``select`` does.
        transform, clip, min_ess, cap: as ``exponentiated_gradient`` takes them.
        nonfinite: what a NaN or infinite score does, ``"error"`` or ``"drop"``.
        curvature: ``"identity"`` or ``"fisher"``.
        damping: mu over the mean of the curvature's diagonal.
        token_budget_per_batch: most tokens a scoring batch; None: as ``InfluenceScorer`` does.
        heldout_fraction: part of the preference rows that is held out where no held-out objective is given.
        patience: rounds without a lower held-out loss after which the loop ends.
        nll_sample: negatives that the mean NLL of all of them is measured on.
        seed: of the held-out split and the sample; round r unlearns with ``unlearn.seed + r``.
    """

    rounds: int = 3
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    strategy: str = "top-k"
    k: int | None = 1024
    threshold: float | None = None
    token_budget: int | None = None
    weights: str = "eg"
    eta: float | None = None
    transform: str = "rank"
    clip: float = 0.05
    min_ess: float = 0.5
    cap: float | None = None
    nonfinite: str = "error"
    curvature: str = "identity"
    damping: float = 0.1
    token_budget_per_batch: int | None = None
    heldout_fraction: float = 0.25
    patience: int = 1
    nll_sample: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key in ("rounds", "patience", "nll_sample"):
            _expect(getattr(self, key) >= 1, name, f"{key} >= 1", getattr(self, key))
        for key, known in (("strategy", STRATEGIES), ("weights", WEIGHTS), ("transform", TRANSFORMS)):
            _expect(getattr(self, key) in known, name, f"{key} out of {list(known)}", getattr(self, key))
        # what select would refuse, before a round of scoring rather than after it
        needed = {"top-k": "k", "as-released": "k", "budget": "token_budget"}.get(self.strategy)
        size = getattr(self, needed) if needed is not None else None
        _expect(needed is None or (size is not None and size >= 1), name, f"{needed} >= 1 for {self.strategy}", size)
        _expect(self.cap is None or self.cap >= 1, name, "cap >= 1 or None", self.cap)
        _expect(self.eta is None or self.eta >= 0, name, "eta >= 0 or None", self.eta)
        _expect(0 <= self.clip < 0.5, name, "0 <= clip < 0.5", self.clip)
        _expect(0 < self.heldout_fraction < 1, name, "0 < heldout_fraction < 1", self.heldout_fraction)
