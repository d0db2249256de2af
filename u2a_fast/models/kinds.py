"""The module kinds whose per-example weight gradients are understood."""

import re
from enum import Enum

from torch import nn
from transformers.pytorch_utils import Conv1D

_NORM_NAME = re.compile(r"(RMS|Layer)Norm(\d*)$")


class Kind(Enum):
    """How a module's output depends on its own parameters, token by token."""

    LINEAR = "y_t = W a_t + b"
    CONV1D = "y_t = W^T a_t + b"
    EMBEDDING = "y_t = f(row of W at the token's index)"
    NORM = "y_t = f(normalized a_t; w, b)"


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of ``module``, None where it is none of them (a subclass may do anything in its ``forward``)."""
    if type(module).forward is nn.Linear.forward:
        return Kind.LINEAR
    if type(module).forward is Conv1D.forward:
        return Kind.CONV1D
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _NORM_NAME.search(type(module).__name__):
        return Kind.NORM
    return None
