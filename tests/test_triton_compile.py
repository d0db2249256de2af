"""Every kernel, as the launchers would launch it on each device family, compiled ahead of time without a GPU.

The launchers run with a recorder in place of the launch: what is compiled (kernel, argument types, constants,
alignment, configuration) is what they would launch. It is compiled in a process without Triton's interpreter, which
runs this file as a script.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton.tools.tensor_descriptor import TensorDescriptor

# Bytes a block may have; the sm_80 family also serves sm_86, sm_89 and sm_120, whose limit is the smaller one.
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
FAMILIES = tuple(SHARED_MEMORY)
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
ATTENTION = ("attention", "attention_backward", "attention_jvp")
ELEMENTWISE = ("glu_jvp", "rms_norm_jvp", "rotary")
HEAD = ("linear_logprob", "linear_logprob_backward", "linear_logprob_jvp")
GRADIENTS = ("ghost_dot", "ghost_dot_lowrank", "ghost_norm", "grad_project", "grad_sketch")
MODULES = ("_attention", *ATTENTION, "_tile", *GRADIENTS, *HEAD, *ELEMENTWISE)
# Bytes of each figure that may spill, where a measurement on a device prefers it: (family, kernel, blocks).
MEASURED_SPILLS = {("sm_90", "attention_jvp_kernel", 128, 64): 32}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


class Recorder:
    """Stands in for ``launch``: keeps each distinct specialization that Triton would compile."""

    def __init__(self) -> None:
        self.launches: dict[str, dict[str, Any]] = {}
        self.configs: list[Any] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], config: Any, /, **arguments: Any) -> None:
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], Any] = {}
        values = {**arguments, **config.blocks}
        for i, parameter in enumerate(kernel.params):
            x = values[parameter.name]
            # Triton makes a constant of None and of 1, and remembers which pointers and integers divide by 16.
            constant = parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1)
            signature[parameter.name] = "constexpr" if constant else _type(x)
            if constant:
                constants[(i,)] = x
            elif isinstance(x, TensorDescriptor | float):
                continue
            elif (x.data_ptr() if isinstance(x, Tensor) else x) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        name = f"{kernel.__name__} {signature} {constants} {attributes} {options}"
        self.configs.append(config)
        source = (kernel, signature, constants, attributes)
        self.launches[name] = {"source": source, "options": options, "config": {**config.blocks, **options}}


def _type(x: Any) -> str:
    if isinstance(x, Tensor):
        return "*" + TYPES[x.dtype]
    if isinstance(x, TensorDescriptor):
        return f"tensordesc<{TYPES[x.base.dtype]}{list(x.block_shape)}>".replace(" ", "")
    if isinstance(x, float):
        return "fp32"
    return "i32" if x < 2**31 else "i64"


def _call_ghost(modules: dict[str, Any], dtype: torch.dtype, n: int) -> None:
    i, o = 64, 128
    a, g, v = (torch.zeros(shape, dtype=dtype) for shape in ((n, i), (n, o), (3, o, i)))
    one, many = torch.tensor([0, n], dtype=torch.int32), torch.tensor([0, *(n,) * n], dtype=torch.int32)
    # One long example takes the tile forms, many short ones the row form and the Gram form.
    modules["ghost_dot"].ghost_dot(a, g, one, v)
    modules["ghost_dot"].ghost_dot(a, g, many, v)
    for rank, k in ((16, 1), (16, 3), (64, 3)):
        left, right = torch.zeros(k, o, rank, dtype=dtype), torch.zeros(k, i, rank, dtype=dtype)
        modules["ghost_dot_lowrank"].ghost_dot_lowrank(a, g, one, left, right)
        modules["grad_project"].grad_project(a, g, one, right[0], left[0])
    modules["ghost_norm"].ghost_norm(a, g, one)
    modules["ghost_norm"].ghost_norm(a, g, many)
    # Blocks of the sketch smaller than a tile, in a sketch that is no power of two, and one that fills the tile.
    for dim in (1000, 8192):
        modules["grad_sketch"].grad_sketch(a, g, one, dim, 2**40)


def _call_head(modules: dict[str, Any], dtype: torch.dtype, n: int, v: int, k: int, full: bool) -> None:
    """``full``: bias, softcap and every tangent and gradient; else none but the tangent and gradient of h."""
    d = 64
    zeros = partial(torch.zeros, dtype=dtype)
    h, weight, target, row = zeros(n, d), zeros(v, d), torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    bias, softcap = (zeros(v), 2.0) if full else (None, 0.0)
    modules["linear_logprob"].linear_logprob(h, weight, target, bias, softcap)
    backward = modules["linear_logprob_backward"]
    backward.linear_logprob_backward(row, row, h, weight, target, row, bias, softcap, True, full)
    dweight, dbias = (zeros(k, v, d), zeros(k, v)) if full else (None, None)
    modules["linear_logprob_jvp"].linear_logprob_jvp(h, weight, target, zeros(k, n, d), dweight, bias, dbias, softcap)


def _call_attention(modules: dict[str, Any], dtype: torch.dtype, width: int, full: bool) -> None:
    """``full``: with segments that continue others, a window and a softcap; else tangents alone, with none of them."""
    n, heads, groups = 1199, 8, 2
    zeros = partial(torch.zeros, dtype=dtype)
    q, k, v = zeros(n, heads, width), zeros(n, groups, width), zeros(n, groups, width)
    cu_seqlens, parent = torch.tensor([0, 500, n], dtype=torch.int32), torch.tensor([-1, 0], dtype=torch.int32)
    options = (cu_seqlens, parent, 0.1, 300, 5.0) if full else (cu_seqlens,)
    if full:
        modules["attention"].attention(q, k, v, *options)
        modules["attention_backward"].attention_backward(q, q, k, v, q, torch.zeros(n, heads), *options)
    modules["attention_jvp"].attention_jvp(q, k, v, *(torch.stack([x, x]) for x in (q, k, v)), *options)


def _call_elementwise(modules: dict[str, Any], dtype: torch.dtype, gelu: bool) -> None:
    n, d, heads, e = 1199, 1280, 16, 64
    zeros = partial(torch.zeros, dtype=dtype)
    x, row = zeros(n, d), zeros(n, heads, e)
    modules["glu_jvp"].glu_jvp(x, x, x, x, gelu)
    modules["glu_jvp"].glu_jvp(x, x, x, None, gelu)
    modules["rms_norm_jvp"].rms_norm_jvp(x, x, torch.zeros(d), torch.zeros(d))
    modules["rms_norm_jvp"].rms_norm_jvp(row.flatten(0, 1), row.flatten(0, 1), torch.zeros(e))
    modules["rotary"].rotary(row, zeros(n, e), zeros(n, e))


def record(family: str) -> tuple[Recorder, list[str]]:
    """The launches on a device of ``family``, and the configurations of its tables that no launch used."""
    modules = {name: importlib.import_module(f"u2a_fast.kernels.{name}") for name in MODULES}
    recorder = Recorder()
    for module in modules.values():
        module.launch = recorder
        module.device_family = lambda device: family
    # More than one block of rows, so that dweight is added to as well as written.
    modules["linear_logprob_backward"].LEAST_ROWS, modules["linear_logprob_backward"].WORKSPACE = 600, 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _call_ghost(modules, dtype, n=1199)
        _call_head(modules, dtype, n=1199, v=129, k=3, full=True)
        _call_head(modules, dtype, n=1199, v=129, k=1, full=True)
    for dtype in (torch.float32, torch.bfloat16):
        _call_elementwise(modules, dtype, gelu=dtype == torch.bfloat16)
        _call_head(modules, dtype, n=1199, v=128, k=1, full=False)
    for dtype, widths in ((torch.float32, (64,)), (torch.bfloat16, (64, 128, 256)), (torch.float16, (64,))):
        for width in widths:
            _call_attention(modules, dtype, width, full=True)
    _call_attention(modules, torch.bfloat16, 128, full=False)
    unused = [
        f"{name}.{table}[{key}]"
        for name, module in modules.items()
        for table in vars(module)
        if table.endswith("CONFIGS")
        for key, config in getattr(module, table).items()
        if key[0] == family and not any(config is used for used in recorder.configs)
    ]
    return recorder, unused


def compile_launches(family: str) -> Iterator[dict[str, Any]]:
    """Compile what ``record`` found and say what came of it: one dict a kernel."""
    from triton.backends.compiler import GPUTarget  # Triton only in the script: pytest's process may interpret
    from triton.compiler import ASTSource, compile

    target = GPUTarget("hip", family, 64) if family.startswith("gfx") else GPUTarget("cuda", int(family[3:]), 32)
    recorder, unused = record(family)
    for name in unused:
        yield {"unused": name}
    for launch in recorder.launches.values():
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = compile(ASTSource(*launch["source"]), target=target, options=launch["options"])
        assembly = compiled.asm["amdgcn" if family.startswith("gfx") else "ptx"]
        yield {
            "kernel": launch["source"][0].__name__,
            "types": [x for x in launch["source"][1].values() if x != "constexpr"],
            "config": launch["config"],
            "shared": compiled.metadata.shared,
            "spills": _spills(family, assembly, log.getvalue()),
            "matrix_unit": _on_matrix_unit(family, launch["config"], assembly),
        }


def _on_matrix_unit(family: str, config: dict[str, int], assembly: str) -> bool:
    # Hopper's and Blackwell's own instructions take 64 rows or more; tiles of 32 by 32 use those of their predecessors.
    small = family in ("sm_90", "sm_100") and config.get("BLOCK_M") == config.get("BLOCK_N") == 32
    return (MATRIX_INSTRUCTION["sm_80"] if small else MATRIX_INSTRUCTION[family]) in assembly


def _spills_allowed(family: str, found: dict[str, Any]) -> int:
    config = found["config"]
    return MEASURED_SPILLS.get((family, found["kernel"], config.get("BLOCK_M"), config.get("BLOCK_N")), 0)


def _spills(family: str, assembly: str, log: str) -> list[int]:
    """What went to memory, as bytes (ptxas), or as vector registers and bytes (AMD, whose scalars spill to registers).

    A log that says nothing is an error, not a zero.
    """
    if family.startswith("gfx"):
        found, figures = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly), 2
    else:
        found, figures = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log), 3
    assert len(found) == figures, f"expected {figures} spill figures, got {found} in {log}"
    return [int(x) for x in found]


def compile_in_process(family: str, cache: Path) -> list[dict[str, Any]]:
    """What ``compile_launches`` says of a family, in a process that never saw Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # ptxas reports at a compile only, so the cache starts empty.
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, __file__, family], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles(family: str, tmp_path: Path) -> None:
    """Every configuration is launched, none spills, each fits, and 16-bit products run on the matrix unit.

    float16 also through TF32; float32 is exact, for which NVIDIA GPUs have no matrix unit.
    """
    found = compile_in_process(family, tmp_path)
    kernels = [r for r in found if "kernel" in r]
    assert [r["unused"] for r in found if "unused" in r] == []
    assert len({r["kernel"] for r in kernels}) == 22
    assert [r for r in kernels if max(r["spills"]) > _spills_allowed(family, r)] == []
    assert [r for r in kernels if r["shared"] > SHARED_MEMORY[family]] == []
    products = [r for r in kernels if "*bf16" in r["types"] or "*fp16" in r["types"]]
    products = [r for r in products if r["kernel"].removesuffix("_kernel") not in ELEMENTWISE]
    assert products
    assert [r for r in products if not r["matrix_unit"]] == []


if __name__ == "__main__":
    for result in compile_launches(sys.argv[1]):
        print(json.dumps(result), flush=True)
