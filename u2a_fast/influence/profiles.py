"""How far truncating each weight of a direction can move the scores of a sample, by rank: what ranks are planned on."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from u2a_fast.data.packing import Example, batched
from u2a_fast.influence.derivatives import DerivativePass
from u2a_fast.influence.lowrank import spectra
from u2a_fast.influence.ranks import GRID, Profile
from u2a_fast.models.capture import Capture
from u2a_fast.models.memory import Room, TokenBudget
from u2a_fast.models.parameters import parameter_names

__all__ = ["profile_ranks"]


def profile_ranks(
    passes: DerivativePass, examples: Sequence[Example], slope: np.ndarray, budget: TokenBudget
) -> tuple[dict[str, Profile], np.ndarray]:
    """A profile of every weight that can be truncated, by parameter name.

    Args:
        passes: the direction itself, on the reverse route.
        examples: m of them.
        slope: (m), |d loss / d NLL_i|.
        budget: most tokens a batch.

    Returns:
        The profiles, and which of the examples fit in memory, (m) bool; the bounds of the others mean nothing.
    """
    found = spectra(passes.decoder, passes.approximation.kept, GRID)
    name_of = parameter_names(passes.decoder.model)
    names = {
        path: name_of[id(p)]
        for path, module in passes.decoder.model.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if own == "weight"
    }

    def parts(_: list[int], batch: Sequence[Example]) -> dict[str, Tensor]:
        passes.propagate(passes.decoder.pack(batch), capture)
        return capture.parts()

    def attempt(room: Room) -> tuple[dict[str, np.ndarray], np.ndarray]:
        bounds = {name: np.zeros((len(spectrum.ranks), len(examples))) for name, spectrum in found.items()}
        fits = np.ones(len(examples), dtype=bool)
        for at, made in room.each(batched(examples, room.tokens), parts):
            fits[at] = made is not None
            for path, part in (made or {}).items():
                bounds[names[path]][:, at] += part.cpu().numpy() * slope[at]
        return bounds, fits

    with passes.running():
        capture = Capture(passes.decoder, {}, found)
        bounds, fits = budget.fit("rank profiles", attempt)
    shapes = {name: (spectrum.left.shape[0], spectrum.right.shape[0]) for name, spectrum in found.items()}
    return {name: Profile(shapes[name], found[name].ranks, bounds[name]) for name in found}, fits
