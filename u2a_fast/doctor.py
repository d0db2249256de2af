"""What works on this machine, what is slow and how to mend it: versions, kernels, devices, ops against references."""

import importlib.util
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from u2a_fast import _register, ops, testing
from u2a_fast.manifest import versions

__all__ = ["Finding", "diagnose"]

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; ``hint`` says how to mend what is slow ("warn") or broken ("fail")."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON holds it."""
        return asdict(self)


def diagnose() -> list[Finding]:
    """Every check once. Nothing broken means no finding of status "fail"; a missing fast path is a "warn"."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    op_checks = [_check_op(op, device) for device in devices for op in _register.OPS]
    return [*_versions(), _cpu_kernels(), _cpu(), _triton(), *_cuda(), *op_checks]


def _versions() -> list[Finding]:
    return [Finding(name, "ok", found or "not installed") for name, found in versions().items()]


def _cpu_kernels() -> Finding:
    error = _register.extension_error
    if error is None:
        missing = [op for op in _register.OPS if "cpu" not in _register.implementations(op)]
        if not missing:
            return Finding("C++ kernels", "ok", "compiled, for every op")
        return Finding("C++ kernels", "fail", f"compiled, but without {', '.join(missing)}", _rebuild_hint())
    status: Literal["warn", "fail"] = "fail" if importlib.util.find_spec("u2a_fast._C") else "warn"
    return Finding("C++ kernels", status, f"{error}: the slow references serve on the CPU", _rebuild_hint())


def _rebuild_hint() -> str:
    compiler = next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None:
        return f"install a C++ compiler (none of {', '.join(COMPILERS)} is on the PATH), then reinstall u2a_fast"
    return f"reinstall with {compiler}: pip install --no-build-isolation --force-reinstall --no-deps <the checkout>"


def _cpu() -> Finding:
    """The instruction sets that the C++ kernels choose from as they run, best last."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # no such file outside of Linux
        flags = set()
    known = [name for name in INSTRUCTION_SETS if name in flags] or [torch.backends.cpu.get_cpu_capability()]
    return Finding("CPU", "ok", f"{platform.machine()}, {torch.get_num_threads()} threads, {', '.join(known)}")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is not None:
        return Finding("Triton", "ok", "installed")
    needed = torch.cuda.is_available()
    hint = "pip install 'u2a_fast[gpu]'" if sys.platform == "linux" else "Triton is published for Linux"
    detail = "not installed: the slow references serve on the GPU" if needed else "not installed (GPUs alone need it)"
    return Finding("Triton", "warn" if needed else "ok", detail, hint if needed else None)


def _cuda() -> list[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        detail = "no usable GPU" if built else "this build of torch is for the CPU alone"
        return [Finding("GPU", "ok", detail)]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        findings.append(Finding(f"GPU {index}", "ok", f"{device.name}, {memory}, sm_{device.major}{device.minor}"))
    return findings


def _check_op(op: str, device: str) -> Finding:
    """The op's first cases, in every dtype, against the float64 reference under the error budget of the tests."""
    name = f"{op} on {device}"
    cases = [case for case in testing.CASES if case.op == op][: len(testing.DTYPES)]
    problems = []
    for case in cases:
        arguments = testing.inputs(case, device)
        try:
            outputs = getattr(ops, op)(**arguments)
        except Exception as error:  # whatever a broken kernel raises is the finding
            problems.append(f"{case.id}: {type(error).__name__}: {error}")
            continue
        problems += [f"{case.id}: {violation}" for violation in testing.violations(case, arguments, outputs)]
    served = device if device in _register.implementations(op) else "reference"
    kernel = {"cpu": "C++", "cuda": "Triton", "reference": "reference"}[served]
    if problems:
        return Finding(name, "fail", f"{kernel}: {problems[0]}", "please report this with the output of doctor --json")
    return Finding(name, "ok", f"{kernel}: {len(cases)} cases agree with the float64 reference")
