"""Who takes part, and what is expected of each."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONTESTANTS", "Contestant", "user_code_lines"]

ADAPTERS = Path(__file__).with_name("adapters")


@dataclass(frozen=True)
class Contestant:
    """One mode of one peer.

    Args:
        label: its line in the table.
        adapter, mode: the function ``benchmarks.peers.adapters.<adapter>.<mode>``; no adapter where it has never been
            possible to install the package, whose row is the error.
        environment: a name of ``environments.PACKAGES``, or "" for the running one.
        truth: what its scores should equal: derivatives over "all" parameters or the "linears" alone, or "norms", the
            squared gradient norms over the linears.
        exact: scores are wrong, and no result, where they differ from the truth by more than rounding.
        ranking: the least Spearman correlation with the truth; below it scores are no result either.
        share: the part of the examples that it is run on, for what takes too long.
        rounds: the most rounds that it takes part in; 0 where its first, cold run is its time.
        largest: parameters of the largest model that it is run on.
    """

    name: str
    label: str
    adapter: str
    mode: str
    environment: str = ""
    truth: str = "all"
    exact: bool = True
    ranking: float = -1.0
    share: float = 1.0
    rounds: int = 1000
    largest: int = 1 << 40

    @property
    def ours(self) -> bool:
        """Whether it is u2a_fast, whose results gate everybody's."""
        return self.adapter == "u2a_fast"


def _ours(mode: str, label: str, **options: object) -> Contestant:
    return Contestant(f"u2a_fast-{mode}", f"u2a_fast, {label}", "u2a_fast", mode, **options)  # type: ignore[arg-type]


def _approximate(name: str, label: str, adapter: str, mode: str, environment: str, **options: object) -> Contestant:
    known = {"truth": "linears", "exact": False} | options
    return Contestant(name, label, adapter, mode, environment, **known)  # type: ignore[arg-type]


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("forward", "forward pass, sorted by length (the unit)", "plain", "forward", truth="", exact=False),
    _ours("reverse", "reverse"),
    _ours("forward", "forward"),
    _ours("lowrank", "low-rank direction", exact=False),
    _ours("reverse_bf16", "reverse, bfloat16", exact=False, ranking=0.995),
    _ours("forward_bf16", "forward, bfloat16", exact=False, ranking=0.995),
    _ours("lowrank_bf16", "low-rank direction, bfloat16", exact=False),
    Contestant("public_padded", "public U2A procedure, padded to 256", "plain", "public_padded", rounds=3),
    Contestant("public", "public U2A procedure, unpadded", "plain", "public"),
    Contestant("torch-jvp", "torch.func.jvp, eager attention", "plain", "forward_jvp"),
    Contestant("hooks", "hooks, plain PyTorch", "plain", "hooks"),
    Contestant("hooks-1", "hooks, plain PyTorch, one at a time", "plain", "hooks_single"),
    Contestant("torch-vmap", "torch.func vmap(grad)", "plain", "vmap_grad", rounds=3),
    Contestant("bergson", "bergson, unprojected", "bergson", "unprojected", "bergson", "linears"),
    Contestant("bergson-jvp", 'bergson, token_influence="output"', "bergson", "output", "bergson", "linears"),
    _approximate("bergson-16", "bergson, projection_dim 16", "bergson", "projected", "bergson"),
    Contestant("kronfluence", "kronfluence, identity", "kronfluence", "identity", "kronfluence", "linears"),
    Contestant("dattri", "dattri TracIn, unprojected", "dattri", "unprojected", "dattri", share=0.08, rounds=0),
    _approximate(
        "dattri-512",
        "dattri TracIn, its default projection",
        "dattri",
        "projected",
        "dattri",
        truth="all",
        share=0.08,
        rounds=0,
        largest=10_000_000,
    ),
    _approximate(
        "traker",
        "vmap(grad), traker BasicProjector to 64",
        "traker",
        "basic_projector",
        "traker",
        truth="all",
        share=0.08,
        rounds=0,
    ),
    _approximate("captum", "captum TracInCPFast (last layer)", "captum", "last_layer", "captum", rounds=3),
    _approximate("logra", "LoGra-style projection to 64 by 64, re-expressed", "projected", "logra", "", rounds=3),
    _approximate("grass", "FactGraSS-style, 64 by 64 to 1024, re-expressed", "projected", "grass", "", rounds=3),
    _approximate("sjlt", "the same with the authors' sjlt", "projected", "grass_sjlt", "sjlt"),
    Contestant("logix", "LogIX (LoGra's own)", "", "", "logix"),
    Contestant("fast_jl", "fast_jl (TRAK's own projector)", "", "", "fast_jl"),
    Contestant("opacus", "gradient norms: opacus ghost clipping", "opacus", "ghost_norm", "opacus", "norms", rounds=3),
    _ours("ghost_norm", "gradient norms by ops.ghost_norm", truth="norms", rounds=3),
)


def user_code_lines(contestant: Contestant) -> int:
    """Lines of code between ``# user code`` (of this mode, or of all) and ``# end`` in its adapter."""
    count, counting = 0, False
    for line in (ADAPTERS / f"{contestant.adapter}.py").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if found := re.fullmatch(r"# user code: ([\w ]+)", text):
            counting = contestant.mode in found[1].split()
        elif text == "# end":
            counting = False
        elif counting and text and not text.startswith("#"):
            count += 1
    return count
