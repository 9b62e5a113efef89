"""Builds the native libraries of sbp_fast with ninja.

Kernels are plain shared objects that register ops through PyTorch's stable ABI: one build serves every
Python and every torch >= 2.10. The prefetcher is a Python module, for the Python that builds it.
``SBP_FAST_BUILD`` says what to build:

``auto``  what this machine can build (the default); what is left out is named with its reason
``cpu``   the CPU kernels and the prefetcher; an error if they cannot be built
``cuda``  the CPU and the CUDA kernels and the prefetcher; an error if they cannot be built
``none``  nothing: pure Python and Triton

setup.py calls `build`. Without setuptools, ``python build_native.py`` builds into the source tree.

torch.utils.cpp_extension is not used: it refuses CUDA sources under a CPU build of torch, and it knows
no flags per file, which the CPU kernels need (one instruction set each).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent

WANTED = {
    "auto": ("cpu", "cuda", "prefetch"),
    "cpu": ("cpu", "prefetch"),
    "cuda": ("cpu", "cuda", "prefetch"),
    "none": (),
}

# The oldest torch whose stable ABI the libraries ask for: 2.10.
TORCH_TARGET_VERSION = "0x020a000000000000"

# Of these, those that nvcc knows: 100 came with CUDA 12.8.
CUDA_ARCHITECTURES = (80, 90, 100)

AVX2 = ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": AVX2,
    "avx512": (
        *AVX2,
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
        # GCC 12 warns about its own AVX-512 header (PR 105593). clang does not know that warning.
        *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    ),
}


class CannotBuildError(Exception):
    """Why a library cannot be built on this machine, and what would change that."""


@dataclass
class Library:
    """One shared object: its sources with their own flags, and how to compile and link them."""

    compiler: list[str]
    built_with: str
    flags: list[str]
    link_flags: list[str]
    sources: dict[Path, tuple[str, ...]]
    file_name: str
    # Compiler and source of a shared object that is linked against but never shipped.
    link_stand_in: tuple[list[str], Path] | None = None


def build(folder: Path, work: Path) -> None:
    """Builds what is wanted into ``folder`` and notes there what was built, and what not and why."""
    choice = os.environ.get("SBP_FAST_BUILD", "auto")
    if choice not in WANTED:
        raise SystemExit(f"SBP_FAST_BUILD is {choice!r}; it must be one of {', '.join(WANTED)}")
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier build left must not be loaded or shipped, whatever becomes of this one.
    for old in (folder / "build.json", *folder.glob("*.so")):
        old.unlink(missing_ok=True)

    built: dict[str, str] = {}
    left_out: dict[str, str] = {}
    failed = []
    for name, describe in LIBRARIES.items():
        if name not in WANTED[choice]:
            left_out[name] = f"SBP_FAST_BUILD={choice} when the package was built"
            continue
        try:
            library = describe()
            shutil.copy(compile_and_link(library, work.resolve() / name), folder)
            built[name] = library.built_with
        except CannotBuildError as reason:
            left_out[name] = str(reason)
            failed.append(f"the {name} library cannot be built: {reason}")
    note = {"choice": choice, "built": built, "left_out": left_out}
    (folder / "build.json").write_text(json.dumps(note, indent=2) + "\n")
    if failed and choice != "auto":
        raise SystemExit(f"SBP_FAST_BUILD={choice}, but " + "\n".join(failed))
    for line in failed:
        print(f"sbp_fast: {line}", file=sys.stderr)


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


def host_compiler() -> list[str]:
    """The command, which in CXX may have several words: ``ccache g++``."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise SystemExit(
                f"CXX is {shlex.join(chosen)!r}, which was not found; correct or unset it"
            )
        return chosen
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CannotBuildError("no C++ compiler was found; install g++ >= 12 or set CXX")


def common_flags(torch: Path) -> list[str]:
    return [
        *("-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"),
        *("-isystem", str(torch / "include")),
    ]


def torch_libraries(torch: Path) -> list[str]:
    return [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]


def cpu_library() -> Library:
    torch = torch_folder()
    compiler = host_compiler()
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources: dict[Path, tuple[str, ...]] = {}
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        instruction_set = path.stem.rpartition("_")[2]
        if x86 or instruction_set not in ("avx2", "avx512"):
            sources[path] = INSTRUCTION_SETS.get(instruction_set, ())
    return Library(
        compiler=compiler,
        built_with=first_line([*compiler, "--version"]),
        flags=[
            *common_flags(torch),
            *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
            *(["-DSBP_FAST_X86"] if x86 else []),
        ],
        link_flags=["-shared", *torch_libraries(torch)],
        sources=sources,
        file_name="libsbp_fast_cpu.so",
    )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for candidate in (Path(home) / "bin" / "nvcc", shutil.which("nvcc")):
        if candidate and Path(candidate).exists():
            return str(Path(candidate).resolve())
    raise CannotBuildError("nvcc was not found; install the CUDA toolkit or set CUDA_HOME")


def cuda_library() -> Library:
    torch = torch_folder()
    nvcc = find_nvcc()
    release = first_line([nvcc, "--version"], containing="release")
    known = output_of([nvcc, "--list-gpu-arch"]).split()
    architectures = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in known]
    if not architectures:
        raise CannotBuildError(
            f"{nvcc} ({release}) compiles for none of the architectures "
            f"{', '.join(map(str, CUDA_ARCHITECTURES))}; install CUDA >= 12"
        )
    newest = architectures[-1]
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    # PTX of the newest one, for devices that come after it.
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")

    compiler = host_compiler()
    # nvcc takes a program here, not a command: of `ccache g++` it gets g++.
    ccbin = ["-ccbin", next(word for word in reversed(compiler) if not word.startswith("-"))]
    # The one symbol that comes from torch's CUDA library, for machines whose torch has none: linked
    # against a stand-in of the same name, resolved by the real one when both are loaded.
    stand_in = ROOT / "csrc" / "cuda" / "link" / "libtorch_cuda.cpp"
    return Library(
        compiler=[nvcc],
        built_with=f"nvcc {release}, for "
        + ", ".join(f"sm_{number}" for number in architectures)
        + f" and as PTX of compute_{newest}",
        flags=[
            *common_flags(torch),
            *("-DUSE_CUDA", *ccbin, "--threads", "0"),
            *("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *code),
        ],
        link_flags=[
            *("-shared", "-cudart", "static", *ccbin, "-Xlinker=--exclude-libs,ALL"),
            *torch_libraries(torch),
        ],
        # With the prefetcher's engine: its module must load where there is no CUDA.
        sources=dict.fromkeys(
            [
                *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
                ROOT / "csrc" / "prefetch" / "cuda_engine.cu",
            ],
            (),
        ),
        file_name="libsbp_fast_cuda.so",
        link_stand_in=(compiler, stand_in),
    )


def prefetch_module() -> Library:
    compiler = host_compiler()
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise CannotBuildError(
            f"{headers / 'Python.h'} was not found; install Python's headers (apt install python3-dev)"
        )
    # pybind11's headers come with torch, so that a build without network needs no other package.
    return Library(
        compiler=compiler,
        built_with=f"{first_line([*compiler, '--version'])}, for Python {platform.python_version()}",
        flags=[
            *("-std=c++20", "-O3", "-isystem", str(torch_folder() / "include")),
            *("-isystem", str(headers), "-pthread"),
            *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
        ],
        link_flags=["-shared", "-pthread"],
        sources={ROOT / "csrc" / "prefetch" / "bindings.cpp": ()},
        file_name=f"prefetch{sysconfig.get_config_var('EXT_SUFFIX')}",
    )


LIBRARIES = {"cpu": cpu_library, "cuda": cuda_library, "prefetch": prefetch_module}


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def first_line(command: list[str], containing: str = "") -> str:
    lines = [line.strip() for line in output_of(command).splitlines() if containing in line]
    return next(filter(None, lines), "of unknown release")


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja")
    if program is not None:
        return [program]
    raise CannotBuildError("ninja was not found; pip install ninja, or apt install ninja-build")


def compile_and_link(library: Library, work: Path) -> Path:
    """The shared object, in ``work``."""
    ninja = find_ninja()
    work.mkdir(parents=True, exist_ok=True)
    target = work / library.file_name
    (work / "build.ninja").write_text(ninja_file(library, target))
    # From the root, sources have relative names: messages say csrc/..., wherever that was.
    command = [*ninja, "-f", str(work / "build.ninja")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout)
    if run.returncode != 0:
        tail = "\n".join((run.stdout + run.stderr).splitlines()[-30:])
        raise CannotBuildError(f"compilation failed:\n{tail}")
    return target


def ninja_file(library: Library, target: Path) -> str:
    work = target.parent
    lines = [
        f"builddir = {escaped(work)}",  # of ninja's own log
        *("rule compile", "  command = $command", "  depfile = $out.d", "  deps = gcc"),
        *("rule link", "  command = $command"),
    ]

    def add(rule: str, output: Path, inputs: list[Path], command: list[str]) -> None:
        lines.append(f"build {escaped(output)}: {rule} {' '.join(map(escaped, inputs))}")
        lines.append("  command = " + shlex.join(command).replace("$", "$$"))

    objects = []
    for source, flags in library.sources.items():
        output = work / f"{source.stem}.o"
        relative = source.relative_to(ROOT)
        dependencies = ["-MMD", "-MF", f"{output}.d"]
        arguments = [*library.flags, *flags, "-c", str(relative), "-o", str(output)]
        add("compile", output, [relative], [*library.compiler, *dependencies, *arguments])
        objects.append(output)
    if library.link_stand_in is not None:
        compiler, source = library.link_stand_in
        output = work / f"{source.stem}.so"
        flags = ("-shared", "-fPIC", f"-Wl,-soname,{output.name}")
        add("link", output, [source], [*compiler, *flags, str(source), "-o", str(output)])
        objects.append(output)
    command = [*library.compiler, *map(str, objects), *library.link_flags, "-o", str(target)]
    add("link", target, objects, command)
    return "\n".join(lines) + "\n"


def escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


if __name__ == "__main__":
    build(ROOT / "sbp_fast" / "_native", ROOT / "build" / "native")
