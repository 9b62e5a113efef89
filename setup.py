"""Builds the native libraries of sbp_fast with ninja.

They are plain shared objects that register ops through PyTorch's stable ABI, not Python modules: one
build serves every Python and every torch >= 2.10. ``SBP_FAST_BUILD`` says what to build:

``auto``  what this machine can build (the default); what is left out is named with its reason
``cpu``   the CPU kernels; an error if they cannot be built
``cuda``  the CPU and the CUDA kernels; an error if they cannot be built
``none``  nothing: pure Python and Triton

torch.utils.cpp_extension is not used: it refuses CUDA sources under a CPU build of torch, and it knows
no flags per file, which the CPU kernels need (one instruction set each).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")

# The oldest torch whose stable ABI the libraries ask for: 2.10.
TORCH_TARGET_VERSION = "0x020a000000000000"

# Messages name csrc/..., not where the package happened to be built.
PREFIX_MAP = f"-fmacro-prefix-map={ROOT}/="

CUDA_ARCHITECTURES = ("80", "90", "100")

INSTRUCTION_SETS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq "
    # GCC 12 warns about its own AVX-512 header (PR 105593).
    "-mprefer-vector-width=512 -Wno-maybe-uninitialized",
}


class CannotBuildError(Exception):
    """Why a library cannot be built on this machine, and what would change that."""


@dataclass
class Library:
    """One shared object: its sources with their own flags, and how to compile and link them."""

    compiler: str
    flags: str
    link_flags: str
    sources: dict[str, str] = field(default_factory=dict)
    # Compiler and source of a shared object that is linked against but never shipped.
    link_stand_in: tuple[str, str] | None = None


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise CannotBuildError(
            f"torch cannot be imported where the build runs ({error}); install torch >= 2.10 and "
            "use --no-build-isolation, or let pip fetch it for an isolated build"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise CannotBuildError(f"torch is {torch.__version__}; its stable ABI serves from 2.10 on")
    return Path(torch.__file__).resolve().parent


def host_compiler() -> str:
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    for name in candidates:
        if name and shutil.which(name):
            return name
    raise CannotBuildError("no C++ compiler was found; install g++ >= 12 or set CXX")


def common_flags(torch: Path) -> str:
    return (
        f"-std=c++20 -O3 -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {torch / 'include'}"
    )


def cpu_library() -> Library:
    torch = torch_folder()
    x86 = platform.machine() in ("x86_64", "AMD64")
    library = Library(
        compiler=host_compiler(),
        flags=common_flags(torch)
        + f" -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi {PREFIX_MAP}"
        + (" -DSBP_FAST_X86" if x86 else ""),
        link_flags=f"-shared -L{torch / 'lib'} -Wl,-rpath,'$$ORIGIN' -ltorch_cpu -lc10",
    )
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        instruction_set = path.stem.removeprefix("kernels_")
        if instruction_set in INSTRUCTION_SETS:
            if instruction_set != "baseline" and not x86:
                continue
            library.sources[str(path)] = INSTRUCTION_SETS[instruction_set]
        else:
            library.sources[str(path)] = ""
    return library


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = [Path(home) / "bin" / "nvcc", shutil.which("nvcc")]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return Path(candidate).resolve()
    raise CannotBuildError("nvcc was not found; install the CUDA toolkit or set CUDA_HOME")


def cuda_library() -> Library:
    torch = torch_folder()
    nvcc = find_nvcc()
    architectures = " ".join(
        f"-gencode=arch=compute_{capability},code=sm_{capability}"
        for capability in CUDA_ARCHITECTURES
    )
    # PTX of the newest one, for devices that come after it.
    newest = CUDA_ARCHITECTURES[-1]
    architectures += f" -gencode=arch=compute_{newest},code=compute_{newest}"
    # The one symbol that comes from torch's CUDA library, for machines whose torch has none: linked
    # against a stand-in of the same name, resolved by the real one when both are loaded.
    stand_in = ROOT / "csrc" / "cuda" / "link" / "libtorch_cuda.cpp"
    return Library(
        compiler=str(nvcc),
        flags=f"{common_flags(torch)} -DUSE_CUDA -ccbin {host_compiler()} --threads 0 "
        f"-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,{PREFIX_MAP} {architectures}",
        link_flags=f"-shared -cudart static -ccbin {host_compiler()} -Xlinker=--exclude-libs,ALL "
        f"./{stand_in.stem}.so -L{torch / 'lib'} -ltorch_cpu -lc10",
        sources={str(path): "" for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))},
        link_stand_in=(host_compiler(), str(stand_in)),
    )


LIBRARIES = {"cpu": cpu_library, "cuda": cuda_library}


class BuildNative(build_ext):
    """Compiles each library with ninja and notes beside them what was built, and what not and why."""

    def run(self) -> None:
        choice = os.environ.get("SBP_FAST_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(
                f"SBP_FAST_BUILD is {choice!r}; it must be one of {', '.join(CHOICES)}"
            )
        wanted = {"auto": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "none": []}
        built: dict[str, str] = {}
        left_out = {
            name: f"SBP_FAST_BUILD={choice} when the package was built"
            for name in LIBRARIES
            if name not in wanted[choice]
        }
        for name in wanted[choice]:
            try:
                built[name] = self.build_library(name)
            except CannotBuildError as reason:
                if choice != "auto":
                    raise SystemExit(
                        f"SBP_FAST_BUILD={choice}, but the {name} library cannot be built: {reason}"
                    ) from None
                left_out[name] = str(reason)
                print(f"sbp_fast: the {name} library is left out: {reason}", file=sys.stderr)
        note = {"choice": choice, "built": built, "left_out": left_out}
        self.native_file("build.json").write_text(json.dumps(note, indent=2) + "\n")

    def native_file(self, name: str) -> Path:
        """Where a built file goes: into the source tree for editable installs, else the build tree."""
        root = ROOT if self.inplace else Path(self.build_lib)
        folder = root / "sbp_fast" / "_native"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def build_library(self, name: str) -> str:
        library = LIBRARIES[name]()
        target = self.native_file(f"libsbp_fast_{name}.so").resolve()
        work = Path(self.build_temp).resolve() / name
        work.mkdir(parents=True, exist_ok=True)
        write_ninja_file(work / "build.ninja", library, target)
        try:
            run = subprocess.run(
                [sys.executable, "-m", "ninja", "-C", str(work)],
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise CannotBuildError(f"ninja could not be run: {error}; pip install ninja") from None
        print(run.stdout)
        if run.returncode != 0:
            tail = "\n".join((run.stdout + run.stderr).splitlines()[-30:])
            raise CannotBuildError(f"compilation failed:\n{tail}")
        return compiler_version(library.compiler)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "sbp_fast" / "_native"
        return [str(path) for path in folder.glob("*")]


def write_ninja_file(path: Path, library: Library, target: Path) -> None:
    from ninja import ninja_syntax

    with path.open("w") as stream:
        writer = ninja_syntax.Writer(stream)
        writer.rule(
            "compile",
            command=f"{library.compiler} -MMD -MF $out.d {library.flags} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        writer.rule("link", command=f"{library.compiler} $in {library.link_flags} -o $out")
        objects = []
        for source, flags in library.sources.items():
            output = Path(source).stem + ".o"
            writer.build(output, "compile", source, variables={"flags": flags})
            objects.append(output)
        stand_ins = []
        if library.link_stand_in is not None:
            compiler, source = library.link_stand_in
            name = Path(source).stem + ".so"
            writer.rule(
                "stand_in", command=f"{compiler} -shared -fPIC -Wl,-soname,{name} $in -o $out"
            )
            writer.build(name, "stand_in", source)
            stand_ins.append(name)
        writer.build(str(target), "link", objects, implicit=stand_ins)


def compiler_version(compiler: str) -> str:
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    if Path(compiler).name == "nvcc":
        return "nvcc " + next((line for line in lines if "release" in line), "of unknown release")
    return lines[0] if lines else compiler


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform but not on Python: py3-none-<platform>."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = os.environ.get("SBP_FAST_BUILD") == "none"

    def get_tag(self) -> tuple[str, str, str]:
        _, _, tag_platform = super().get_tag()
        return "py3", "none", tag_platform


setup(
    # One nominal extension, so that setuptools runs build_ext and treats the wheel as a binary one.
    ext_modules=[Extension("sbp_fast._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
