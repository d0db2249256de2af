"""Ops for arrays of any library: NumPy, and whatever exports CPU memory through DLPack (JAX, CuPy on the host, torch).

Nothing is copied and torch is not needed: the C++ kernels read the caller's memory. Letters and meaning are those of
:mod:`u2a_fast.reference`; float16, bfloat16 (through DLPack), float32 and float64 are accepted, rows contiguous.
"""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SupportsDLPack", "ghost_dot", "ghost_norm"]


class SupportsDLPack(Protocol):
    """An array that can lend its memory (https://dmlc.github.io/dlpack)."""

    def __dlpack__(self) -> Any: ...


def _kernels() -> Any:
    try:
        from . import _interop  # built only where a compiler was found
    except ImportError as error:
        raise ImportError(
            "[interop] expected the extension u2a_fast._interop, which was not built; install a C++17 compiler and "
            "pybind11, then reinstall u2a_fast with --no-build-isolation"
        ) from error
    return _interop


def ghost_dot(a: SupportsDLPack, g: SupportsDLPack, cu_seqlens: SupportsDLPack, v: SupportsDLPack) -> "np.ndarray":
    """Inner products <V_k, G_i> of K directions with the weight gradients of B examples, G_i = sum_{t in i} g_t a_t^T.

    Args:
        a: layer inputs, (N, I).
        g: gradients at the layer's outputs, (N, O), of a's dtype.
        cu_seqlens: offsets of the examples, (B + 1) int32, from 0 to N.
        v: directions, (K, O, I), of a's dtype.

    Returns:
        (K, B); float32, or float64 for float64 arguments.

    Raises:
        ValueError: a shape, a stride, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit, or an argument does not export DLPack.
        ImportError: the C++ extension was not built.
    """
    return _kernels().ghost_dot(a, g, cu_seqlens, v)


def ghost_norm(a: SupportsDLPack, g: SupportsDLPack, cu_seqlens: SupportsDLPack) -> "np.ndarray":
    """Squared Frobenius norms of the weight gradients of B examples.

    Args:
        a: layer inputs, (N, I).
        g: gradients at the layer's outputs, (N, O), of a's dtype.
        cu_seqlens: offsets of the examples, (B + 1) int32, from 0 to N.

    Returns:
        (B); float32, or float64 for float64 arguments.

    Raises:
        ValueError: a shape, a stride, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit, or an argument does not export DLPack.
        ImportError: the C++ extension was not built.
    """
    return _kernels().ghost_norm(a, g, cu_seqlens)
