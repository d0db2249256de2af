"""Build of the two C++ modules; everything else about the package is in pyproject.toml.

``u2a_fast._C`` registers the CPU kernels with PyTorch through the LibTorch stable ABI (one abi3 binary for every
Python >= 3.11 and torch >= 2.11); ``u2a_fast._interop`` offers the same kernels to NumPy and DLPack callers. Both are
optional: a machine without a compiler, torch or pybind11 gets a working package on the reference implementations.

CPU features are chosen at run time, so no ``-march`` appears here.
"""

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
ABI = "0x030B0000"
STABLE_ABI_MACROS = [
    ("Py_LIMITED_API", ABI),
    ("TORCH_TARGET_VERSION", "((2ULL << 56) | (11ULL << 48))"),
    ("TORCH_STABLE_ONLY", None),
]
COMPILE_ARGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]


def torch_extension() -> Extension:
    from torch.utils import cpp_extension  # torch is a build dependency of this extension only

    return Extension(
        "u2a_fast._C",
        [str(CSRC / "torch_ops.cpp")],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "c10"],
        define_macros=STABLE_ABI_MACROS,
        extra_compile_args=COMPILE_ARGS,
        depends=[str(path) for path in CSRC.iterdir()],
        py_limited_api=True,
        optional=True,
    )


def interop_extension() -> Extension:
    import pybind11  # a build dependency of this extension only

    return Extension(
        "u2a_fast._interop",
        [str(CSRC / "interop.cpp")],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=COMPILE_ARGS,
        depends=[str(path) for path in CSRC.iterdir()],
        optional=True,
    )


def extensions() -> list[Extension]:
    builders = {"torch": torch_extension, "pybind11": interop_extension}
    found = []
    for module, builder in builders.items():
        if importlib.util.find_spec(module) is None:
            print(f"WARNING: {module} is not installed: building without {builder.__name__}", file=sys.stderr)
        else:
            found.append(builder())
    return found


class OptionalBuild(build_ext):
    """Compiles the kernels once, in parallel, for both modules, and says plainly what a failed build means."""

    def build_extensions(self) -> None:
        kernels = sorted(str(path) for path in CSRC.glob("*_kernel.cpp"))
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = [name for names in pool.map(self._compile, kernels) for name in names]
        except CompileError as error:
            print(f"WARNING: the kernels do not compile: {error}", file=sys.stderr)
            return
        for extension in self.extensions:
            extension.extra_objects = [*extension.extra_objects, *objects]
        super().build_extensions()

    def _compile(self, source: str) -> list[str]:
        return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=COMPILE_ARGS)

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name)))
            if not (built.exists() or Path(self.get_ext_fullpath(extension.name)).exists()):
                print(
                    f"WARNING: {extension.name} could not be built: u2a_fast will run on its slower reference "
                    "implementations; install a C++17 compiler and reinstall with --no-build-isolation",
                    file=sys.stderr,
                )


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
