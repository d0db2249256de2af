"""Host side of every kernel: the device family, its configurations and the launch."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "FAMILIES",
    "Config",
    "Configs",
    "aligned",
    "device_family",
    "inner_contiguous",
    "launch",
    "needs_reference",
    "operand",
    "programs",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# "sm_80" also serves the NVIDIA GPUs that have no family of their own (sm_86, sm_89, sm_120), whose blocks get at
# most 99 KiB of shared memory; "gfx942" serves every AMD GPU.
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
INTERPRETER = "interpreter"

# Triton derives wide loads from integers that are multiples of 16, not of smaller powers of two.
ALIGNMENT = 16


@dataclass(frozen=True)
class Config:
    """Block sizes (compile-time constants of a kernel, by name) and the two options that Triton takes beside them.

    ``tma``: the copy engine of Hopper and later brings the operands' tiles (see ``operand``). ``persistent``: a program
    for every multiprocessor, which takes tile after tile, so that the next one's loads begin under a tile's epilogue.
    """

    blocks: Mapping[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False


# Keyed by device family and bytes an element. A configuration depends on neither N nor B, so that an example's result
# does not depend on what it is batched with.
Configs = Mapping[tuple[str, int], Config]


def device_family(device: torch.device) -> str:
    """The key under which ``device`` finds its configurations; CPU tensors go to Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def needs_reference(x: Tensor) -> bool:
    """Whether the kernels leave this input to the reference: float64, which accumulates in float64."""
    return x.dtype == torch.float64


def aligned(x: Tensor) -> Tensor:
    """``x`` with rows that the kernels can read 16 bytes at a time, whatever its dtype: a view where possible.

    Its last dimension is contiguous and a multiple of ALIGNMENT long, its other strides are multiples of ALIGNMENT and
    its data starts on a 16-byte boundary. Models' layers are so already; others are copied, with zero columns added.
    """
    missing = -x.shape[-1] % ALIGNMENT
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    if x.stride(-1) == 1 and not any(s % ALIGNMENT for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def inner_contiguous(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension: itself where possible, and whatever its other strides are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def operand(x: Tensor, config: Config, rows: str, columns: str) -> Tensor | TensorDescriptor:
    """An ``aligned`` matrix as kernels take it: itself or, where the configuration says so, a descriptor of its tiles.

    ``rows``, ``columns``: the names of the tile's sizes among the blocks. An empty matrix has no descriptor.
    """
    if not config.tma or x.numel() == 0:
        return x
    if x.stride(0) < x.shape[1]:  # rows that overlap, as an expanded one does, are no matrix to the copy engine
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a single row's stride as it is
    return TensorDescriptor.from_tensor(x, [config.blocks[rows], config.blocks[columns]])


def programs(config: Config, device: torch.device, tiles: int) -> int:
    """Programs that share ``tiles`` tiles."""
    if not config.persistent:
        return tiles
    if device.type == "cpu":  # the interpreter, where two tiles a program show what many would
        return -(-tiles // 2)
    return min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], config: Config, /, **arguments: object) -> None:
    """Run ``kernel`` over ``grid`` on the device of its tensors (Triton itself would use the current device)."""
    if 0 in grid:  # Triton would compile first: an empty operand beside the descriptor of another does not
        return
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    with _on_device_of(tensor):
        kernel[grid](**arguments, **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages)
