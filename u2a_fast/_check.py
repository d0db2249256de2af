"""User-facing argument checks of all ops: a message names the op, the argument, what was expected and what came."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sketch import MAX_DIM, MIN_DIM

__all__ = [
    "Shapes",
    "check_cu_seqlens",
    "check_dtypes",
    "check_parent",
    "check_sketch",
    "check_softcap",
    "check_target",
    "check_window",
]

# So many offsets are checked sooner as a list: NumPy's calls take as long as a small layer's products.
_FEW = 512
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Shapes:
    """Binds the shape letters of one call: a letter means what the first argument that uses it says.

    Args:
        op: name of the op, for the messages.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.sources: dict[str, str] = {}
        self._device: torch.device | None = None
        self._device_source = ""

    def bind(self, name: str, x: Tensor, letters: str) -> None:
        """Check that ``x`` is a tensor on the call's device with one axis a letter, each as long as the letter says.

        Args:
            name: the argument's name.
            x: the argument.
            letters: space-separated shape letters, e.g. ``"N I"``.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: another shape or another device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"[{self.op}] expected {name} to be a Tensor, got {type(x).__name__}")
        axes, shape = letters.split(), x.shape
        fits = len(axes) == len(shape)
        for c, n in zip(axes, shape, strict=False):
            if c not in self.sizes:
                self.sizes[c], self.sources[c] = n, name
            elif self.sizes[c] != n:
                fits = False
        if not fits:
            others = [c for c in axes if self.sources.get(c, name) != name]
            bound = [f"{c} = {self.sizes[c]} (from {self.sources[c]})" for c in others]
            wanted = f"({axes[0]},)" if len(axes) == 1 else f"({', '.join(axes)})"
            given = f" with {', '.join(bound)}" if bound else ""
            raise ValueError(f"[{self.op}] expected {name} of shape {wanted}{given}, got {tuple(shape)}")
        self.check_device(name, x)

    def check_device(self, name: str, x: Tensor) -> None:
        """Check that ``x`` lives where the first argument of the call lives."""
        if self._device is None:
            self._device, self._device_source = x.device, name
        if x.device != self._device:
            raise ValueError(
                f"[{self.op}] expected {name} on {self._device} (from {self._device_source}), got {x.device}"
            )


def check_dtypes(op: str, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Check that the given tensors share one floating dtype out of float16, bfloat16, float32 and float64."""
    (first_name, first), *others = ((name, x) for name, x in tensors if x is not None)
    if first.dtype not in _FLOATS:
        raise TypeError(f"[{op}] expected {first_name} of dtype {' or '.join(map(str, _FLOATS))}, got {first.dtype}")
    for name, x in others:
        if x.dtype != first.dtype:
            raise TypeError(f"[{op}] expected {name} of dtype {first.dtype} (from {first_name}), got {x.dtype}")


def _values_are_readable(x: Tensor) -> bool:
    # Reading values would stop a CUDA stream or break a traced graph; there the caller answers for them.
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def check_cu_seqlens(shapes: Shapes, cu_seqlens: Tensor, tokens_from: str) -> None:
    """Check that ``cu_seqlens`` (B + 1) is int32 and, on CPU, runs from 0 to N without decreasing.

    Args:
        shapes: the call's letters; N must be bound.
        cu_seqlens: offsets of the examples.
        tokens_from: name of the argument that fixed N.
    """
    op, name = shapes.op, "cu_seqlens"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"[{op}] expected {name} to be a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"[{op}] expected {name} of dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"[{op}] expected {name} of shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    shapes.check_device(name, cu_seqlens)
    shapes.sizes["B"] = cu_seqlens.shape[0] - 1
    shapes.sources["B"] = name
    if not _values_are_readable(cu_seqlens):
        return
    few, n = cu_seqlens.shape[0] <= _FEW, shapes.sizes["N"]
    values: Any = cu_seqlens.tolist() if few else cu_seqlens.numpy()
    if values[0] != 0:
        raise ValueError(f"[{op}] expected {name} to start at 0, got {values[0]}")
    if values[-1] != n:
        raise ValueError(f"[{op}] expected {name} to end at N = {n} (from {tokens_from}), got {values[-1]}")
    if not (sorted(values) == values if few else (values[1:] >= values[:-1]).all()):
        i = next(i for i in range(len(values) - 1) if values[i + 1] < values[i])
        raise ValueError(
            f"[{op}] expected {name} to be non-decreasing, got {values[i]} then {values[i + 1]} at position {i}"
        )


def check_parent(shapes: Shapes, parent: Tensor) -> None:
    """Check that ``parent`` (B) is int32 and, on CPU, that it starts with -1 and names the last -1 before it or -1."""
    op = shapes.op
    if not isinstance(parent, Tensor):
        raise TypeError(f"[{op}] expected parent to be a Tensor, got {type(parent).__name__}")
    if parent.dtype != torch.int32:
        raise TypeError(f"[{op}] expected parent of dtype torch.int32, got {parent.dtype}")
    shapes.bind("parent", parent, "B")
    if not _values_are_readable(parent):
        return
    order = torch.arange(parent.shape[0], dtype=torch.int32)
    root = torch.where(parent < 0, order, -1).cummax(0).values if parent.shape[0] else parent
    wrong = torch.nonzero((parent < -1) | ((parent >= 0) & (parent != root)))
    if wrong.shape[0]:
        i = int(wrong[0])
        raise ValueError(
            f"[{op}] expected parent to be -1 or the last segment before it whose parent is -1, got {int(parent[i])} "
            f"at position {i}"
        )


def check_window(op: str, window: int) -> None:
    """Check that ``window`` is an integer that is not negative (0: no window)."""
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"[{op}] expected window an int >= 0, got {window!r}")


def check_sketch(op: str, dim: int, seed: int) -> None:
    """Check that ``dim`` and ``seed`` are integers that a sketch can have."""
    for name, value, least, most in (("dim", dim, MIN_DIM, MAX_DIM), ("seed", seed, 0, 2**63 - 1)):
        # under a symbolic trace an integer is a torch.SymInt
        if not isinstance(value, int | torch.SymInt) or not least <= value <= most:
            raise ValueError(f"[{op}] expected {name} an int from {least} to {most}, got {value!r}")


def check_target(shapes: Shapes, target: Tensor) -> None:
    """Check that ``target`` (N) is int64 and, on CPU, lies in [0, V)."""
    shapes.bind("target", target, "N")
    if target.dtype != torch.int64:
        raise TypeError(f"[{shapes.op}] expected target of dtype torch.int64, got {target.dtype}")
    if not _values_are_readable(target):
        return
    v = shapes.sizes["V"]
    outside = torch.nonzero((target < 0) | (target >= v))
    if outside.shape[0]:
        i = int(outside[0])
        raise ValueError(
            f"[{shapes.op}] expected target in [0, V) with V = {v} (from weight), got {int(target[i])} at position {i}"
        )


def check_softcap(op: str, softcap: float) -> None:
    """Check that ``softcap`` is a finite number that is not negative (0: no cap)."""
    if not (isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"[{op}] expected softcap finite and >= 0, got {softcap}")
