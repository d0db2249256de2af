"""Directional derivatives of per-example losses in a model's parameters, without a weight gradient.

A layer's directional derivative <V, G_i> = sum_{t in i} g_t . (dy_t/dtheta V) needs its inputs and its output's
gradient g only. Forward hooks keep the inputs; a hook on the output's gradient contracts both as soon as the backward
pass brings g, and lets the inputs go. Backward starts at the first module that a direction touches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import Packed
from u2a_fast.models.contractions import Factors, Site, contraction
from u2a_fast.models.decoder import Decoder, probe_examples
from u2a_fast.models.kinds import Kind, kind_of
from u2a_fast.models.parameters import parameter_names

__all__ = ["Capture"]


class Capture:
    """Contracts the per-example gradients of every module with given directions, one packed batch at a time.

    Args:
        decoder: the model.
        directions: parameter name (of ``decoder.model.named_parameters()``) -> (K, *shape). The head's own weight and
            bias are the caller's affair where ``decoder.head`` is not None (a tied embedding's use as an embedding is
            not).
        factors: name of a linear layer's weight, not among the directions -> its factors.

    Raises:
        NotImplementedError: a direction touches a module of a kind that is not understood, or one that is never called.
    """

    def __init__(
        self, decoder: Decoder, directions: Mapping[str, Tensor], factors: Mapping[str, Factors] | None = None
    ) -> None:
        self.decoder = decoder
        self.sites = _find_sites(decoder, directions, factors or {})
        self._results: list[tuple[int, Tensor]] = []
        self._cu_seqlens: Tensor | None = None
        self._calls: dict[int, int] = {}
        self._tracing = False
        if self.sites:
            self._find_token_axes()

    def _find_token_axes(self) -> None:
        packed = self.decoder.pack(probe_examples(self.decoder))
        self._tracing = True
        try:
            with torch.no_grad(), self.hooked(packed):
                h = self.decoder.hidden(packed)
                if self.decoder.head is None:
                    self.decoder.materialized_logprobs(h[packed.rows], packed.target)
        finally:
            self._tracing = False

    def _trace(self, site: Site, out: Tensor) -> None:
        n = int(self._require_cu_seqlens()[-1])
        axes = [axis for axis, size in enumerate(out.shape) if size == n]
        if len(axes) != 1:
            raise NotImplementedError(
                f"[capture] expected the output of {site.path} ({type(site.module).__name__}) to have one token axis "
                f"of {n}, got shape {tuple(out.shape)}"
            )
        site.token_axis = axes[0]

    def _require_cu_seqlens(self) -> Tensor:
        assert self._cu_seqlens is not None, "hooks run inside hooked() only"
        return self._cu_seqlens

    def _hook(self, i: int) -> Callable[..., Tensor]:
        site = self.sites[i]

        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            self._calls[i] = self._calls.get(i, 0) + 1
            if self._tracing:
                self._trace(site, out)
                _check_unchanged(site, type(module).forward(module, *args, **kwargs), out)
                return out
            contract = contraction(site, args, kwargs, out)
            if not out.requires_grad:
                # a graph starts here; the clone lets the model change its output in place
                out = out.detach().requires_grad_().clone()

            cu_seqlens = self._require_cu_seqlens()

            def on_gradient(g: Tensor) -> None:
                with torch.no_grad():
                    self._results.append((i, contract(g, cu_seqlens)))

            out.register_hook(on_gradient)
            return out

        return after_forward

    @contextmanager
    def over(self, cu_seqlens: Tensor) -> Iterator[None]:
        """Modules called in this block see rows that these offsets divide among the examples."""
        outer, self._cu_seqlens = self._cu_seqlens, cu_seqlens
        try:
            yield
        finally:
            self._cu_seqlens = outer

    @contextmanager
    def hooked(self, packed: Packed) -> Iterator[None]:
        """Run forward and backward of one packed batch inside this block, then read ``result``."""
        self._results, self._calls = [], {}
        handles = [s.module.register_forward_hook(self._hook(i), with_kwargs=True) for i, s in enumerate(self.sites)]
        try:
            with self.over(packed.cu_seqlens):
                yield
        finally:
            for handle in handles:
                handle.remove()
        if silent := [site for i, site in enumerate(self.sites) if i not in self._calls]:
            raise NotImplementedError(
                f"[capture] {silent[0].path} ({type(silent[0].module).__name__}) holds a selected parameter but is "
                "never called as a module, so its gradient is not seen; leave it out of the selection"
            )

    def parts(self) -> dict[str, Tensor]:
        """Each module's contraction, (K, B) float64, by its path, in the order of the modules' first calls."""
        found: dict[int, list[Tensor]] = {i: [] for i in self._calls}
        for i, value in self._results:
            found[i].append(value)
        self._results = []
        return {
            self.sites[i].path: torch.stack(values).sum(0, dtype=torch.float64) for i, values in found.items() if values
        }


def _check_unchanged(site: Site, own: Tensor, out: Tensor) -> None:
    if own.shape != out.shape or not torch.allclose(own, out, equal_nan=True):
        raise NotImplementedError(
            f"[capture] the output of {site.path} ({type(site.module).__name__}) is not what its class computes: a "
            "hook or a replaced forward changes it, which its gradient would not show"
        )


def _find_sites(decoder: Decoder, directions: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> list[Site]:
    name_of = parameter_names(decoder.model)
    sites, seen = [], set()
    for path, module in decoder.model.named_modules():
        if module is decoder.head_module and decoder.head is not None:
            seen |= {name_of[id(p)] for p in module.parameters(recurse=False)}
            continue
        names = {name: name_of[id(p)] for name, p in module.named_parameters(recurse=False)}
        own = {name: directions[full] for name, full in names.items() if full in directions}
        factored = factors.get(names.get("weight", ""))
        if not own and factored is None:
            continue
        seen |= set(names.values())
        kind = kind_of(module)
        linear = kind in (Kind.LINEAR, Kind.CONV1D)
        unknown = set(own) - {"weight", "bias"} if linear else set()
        if kind is None or unknown:
            raise NotImplementedError(
                f"[capture] {path} is a {type(module).__name__}, a module kind that is not understood, and holds "
                f"selected parameters {sorted(own)}; leave it out of the selection"
            )
        padding = getattr(module, "padding_idx", None)
        if kind is Kind.EMBEDDING and padding is not None:
            own = {name: v.index_fill(1, torch.tensor([padding], device=v.device), 0) for name, v in own.items()}
        sites.append(Site(path, module, kind, own, factored))
    if missed := sorted({*directions, *factors} - seen):
        raise NotImplementedError(f"[capture] no module of the model holds the parameters {missed}")
    return sites
