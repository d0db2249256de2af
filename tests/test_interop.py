"""The DLPack door gives the torch op's bits, borrows memory, and explains itself; without torch in the process."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from u2a_fast import interop, ops, testing

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("u2a_fast._interop") is None, reason="the extension u2a_fast._interop was not built"
)
CASES = [case for case in testing.CASES if case.op in interop.__all__]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_bits_as_the_torch_op(case: testing.Case) -> None:
    arguments = testing.inputs(case)
    want = getattr(ops, case.op)(**arguments)
    got = getattr(interop, case.op)(**arguments)
    assert isinstance(got, np.ndarray)
    assert torch.equal(torch.from_numpy(got), want)


def test_numpy_arrays_and_views() -> None:
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((6, 9), np.float32)[:, 2:7], rng.standard_normal((6, 4), np.float32)
    v, cu_seqlens = rng.standard_normal((2, 4, 5), np.float32), np.array([0, 2, 6], np.int32)
    want = ops.ghost_dot(*(torch.from_numpy(x) for x in (a, g, cu_seqlens, v)))
    assert np.array_equal(interop.ghost_dot(a, g, cu_seqlens, v), want.numpy())


def test_wrong_arguments() -> None:
    a, g = np.zeros((6, 3), np.float32), np.zeros((6, 4), np.float32)
    v, cu_seqlens = np.zeros((1, 4, 3), np.float32), np.array([0, 6], np.int32)
    for arguments, kind, text in [
        (
            (a, g[:5], cu_seqlens, v),
            ValueError,
            "[ghost_dot] expected g of shape (N, O) with N = 6 (from a), got (5, 4)",
        ),
        (
            (a, g, cu_seqlens, v[0]),
            ValueError,
            "[ghost_dot] expected v of shape (K, O, I) with O = 4 (from g), I = 3 (from a), got (4, 3)",
        ),
        ((a, g, cu_seqlens[:1], v), ValueError, "[ghost_dot] expected cu_seqlens to end at N = 6 (from a), got 0"),
        ((a, g, cu_seqlens[::-1].copy(), v), ValueError, "[ghost_dot] expected cu_seqlens to start at 0, got 6"),
        ((a, g, cu_seqlens.astype(np.int64), v), TypeError, "[ghost_dot] expected cu_seqlens of dtype int32"),
        ((a, g.astype(np.float64), cu_seqlens, v), TypeError, "[ghost_dot] expected g of a's dtype"),
        ((a.T.copy().T, g, cu_seqlens, v), ValueError, "[ghost_dot] expected a with contiguous rows"),
        ((a.tolist(), g, cu_seqlens, v), TypeError, "[ghost_dot] expected a to have __dlpack__, got list"),
    ]:
        with pytest.raises(kind) as raised:
            interop.ghost_dot(*arguments)
        assert str(raised.value) == text


def test_kernels_run_without_torch() -> None:
    spec = importlib.util.find_spec("u2a_fast._interop")
    assert spec is not None and spec.origin is not None
    program = (
        "import importlib.machinery as m, importlib.util as u, sys, numpy as np\n"
        f"spec = u.spec_from_file_location('_interop', {str(Path(spec.origin))!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "one = np.ones((4, 3), np.float32)\n"
        "out = module.ghost_dot(one, one, np.array([0, 1, 4], np.int32), np.ones((1, 3, 3), np.float32))\n"
        "assert out.tolist() == [[9.0, 27.0]], out\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
