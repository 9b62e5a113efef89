"""The native build: nothing old stays, what cannot be built says why, and commands are quoted."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import cuda_source
import pytest

import build_native
from sbp_fast.ops import native

LIBRARIES = ("cpu", "cuda", "prefetch")
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an earlier build left all libraries."""
    folder = tmp_path / "_native"
    folder.mkdir()
    for name in LIBRARIES:
        (folder / f"libsbp_fast_{name}.so").write_text("old")
    note = {"choice": "auto", "built": dict.fromkeys(LIBRARIES, "old"), "left_out": {}}
    (folder / "build.json").write_text(json.dumps(note))
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """The package with that folder as its own."""
    monkeypatch.setattr(native, "FOLDER", folder)
    native.build_note.cache_clear()
    yield folder
    native.build_note.cache_clear()


def build(folder: Path) -> dict[str, dict[str, str]]:
    build_native.build(folder, folder.parent / "work")
    return noted(folder)


def noted(folder: Path) -> dict[str, dict[str, str]]:
    note: dict[str, dict[str, str]] = json.loads((folder / "build.json").read_text())
    return note


def libraries_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.so"))


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project of one source, in a folder with a blank; its CPU library is all there is to build."""
    root = tmp_path / "a project: $x"
    source = root / "csrc" / "tiny.cpp"
    source.parent.mkdir(parents=True)
    (root / "include dir").mkdir()
    (root / "include dir" / "tiny.h").write_text("#define ANSWER 42\n")
    source.write_text(
        '#include <tiny.h>\nextern "C" int answer() { return ANSWER; }\n'
        'extern "C" const char* file() { return __FILE__; }\n'
    )

    def describe() -> build_native.Library:
        return build_native.Library(
            compiler=build_native.host_compiler(),
            built_with="a compiler",
            flags=["-fPIC", "-isystem", str(root / "include dir")],
            link_flags=["-shared", f"-L{root / 'include dir'}"],
            sources={source: ()},
            file_name="libsbp_fast_cpu.so",
        )

    monkeypatch.setattr(build_native, "ROOT", root)
    monkeypatch.setattr(build_native, "LIBRARIES", {"cpu": describe})
    monkeypatch.setenv("SBP_FAST_BUILD", "cpu")
    return root


def test_none_leaves_no_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("SBP_FAST_BUILD", "none")
    assert build(folder)["built"] == {}
    assert libraries_in(folder) == []


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("SBP_FAST_BUILD", "gpu")
    with pytest.raises(SystemExit, match="'gpu'; it must be one of auto, cpu, cuda, none"):
        build(folder)


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_a_failed_build_is_an_error_and_leaves_no_library(
    monkeypatch: pytest.MonkeyPatch, folder: Path, choice: str
) -> None:
    monkeypatch.setenv("SBP_FAST_BUILD", choice)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SystemExit, match="the cpu library cannot be built: compilation failed"):
        build(folder)
    assert libraries_in(folder) == []
    assert set(noted(folder)["left_out"]) == set(LIBRARIES)


def test_auto_leaves_out_what_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("SBP_FAST_BUILD", "auto")
    monkeypatch.setenv("CXX", "false")
    note = build(folder)
    assert note["built"] == {}
    assert "compilation failed" in note["left_out"]["cpu"]
    assert libraries_in(folder) == []


def test_blanks_in_paths_and_words_in_cxx(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setenv("CXX", f"env {cuda_source.gxx()}")
    assert build(tiny / "_native")["built"] == {"cpu": "a compiler"}
    library = ctypes.CDLL(str(tiny / "_native" / "libsbp_fast_cpu.so"))
    assert library.answer() == 42
    library.file.restype = ctypes.c_char_p
    assert library.file() == b"csrc/tiny.cpp"


def test_a_changed_header_is_compiled_in(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    cuda_source.gxx()
    (tiny / "csrc" / "own.h").write_text("#define OWN 1\n")
    source = tiny / "csrc" / "tiny.cpp"
    source.write_text('#include "own.h"\nextern "C" int own() { return OWN; }\n')
    build(tiny / "_native")
    (tiny / "csrc" / "own.h").write_text("#define OWN 2\n")
    build(tiny / "_native")
    assert ctypes.CDLL(str(tiny / "_native" / "libsbp_fast_cpu.so")).own() == 2


def test_ninja_is_a_module_or_a_program(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    found = {"ninja": "/somewhere/ninja"}
    monkeypatch.setattr(build_native.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_native.shutil, "which", found.get)
    assert build_native.find_ninja() == ["/somewhere/ninja"]
    found.clear()
    with pytest.raises(build_native.CannotBuildError, match="pip install ninja"):
        build_native.find_ninja()


def test_a_cxx_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="CXX is 'no-such-compiler -m64', which was not found"):
        build_native.host_compiler()


def test_architectures_are_those_that_nvcc_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listing = "compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n"
    program(
        tmp_path / "bin" / "nvcc",
        f'case $1 in --list-gpu-arch) printf "{listing}";; *) echo "release 12.0, V12.0.1";; esac',
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"env {sys.executable}")
    library = build_native.cuda_library()
    assert [flag for flag in library.flags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert library.built_with == (
        "nvcc release 12.0, V12.0.1, for sm_80, sm_90 and as PTX of compute_90"
    )
    assert library.flags[library.flags.index("-ccbin") + 1] == sys.executable

    program(tmp_path / "bin" / "nvcc", "exit 1")
    with pytest.raises(build_native.CannotBuildError, match="install CUDA >= 12"):
        build_native.cuda_library()


def test_libraries_that_the_note_does_not_name_are_not_loaded(installed: Path) -> None:
    note = {"choice": "none", "built": {}, "left_out": {"cpu": "nobody wanted it"}}
    (installed / "build.json").write_text(json.dumps(note))
    assert native._load("cpu") == (False, "the cpu library was not built: nobody wanted it")


def test_without_a_note_nothing_is_loaded(installed: Path) -> None:
    (installed / "build.json").unlink()
    assert "never built" in native._load("cpu").reason


def test_a_library_that_the_note_names_and_is_missing(installed: Path) -> None:
    (installed / "libsbp_fast_cpu.so").unlink()
    assert "install the package again" in native._load("cpu").reason


def test_a_prefetcher_for_another_python_is_not_loaded(installed: Path) -> None:
    native.prefetch_module.cache_clear()
    usable, reason = native.load_prefetch.__wrapped__()
    assert not usable
    assert "is missing, as it was built by another Python; install the package again" in reason

    (installed / f"prefetch{EXTENSION}").write_text("no module")
    usable, reason = native.load_prefetch.__wrapped__()
    assert not usable
    assert "the prefetch module does not load" in reason

    note = {"choice": "none", "built": {}, "left_out": {"prefetch": "nobody wanted it"}}
    (installed / "build.json").write_text(json.dumps(note))
    native.build_note.cache_clear()
    reason = native.load_prefetch.__wrapped__().reason
    assert reason == "the prefetch module was not built: nobody wanted it"
    native.prefetch_module.cache_clear()


def test_the_prefetcher_needs_the_headers_of_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        build_native.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "include")}
    )
    with pytest.raises(
        build_native.CannotBuildError, match=r"Python.h was not found; install Pyth"
    ):
        build_native.prefetch_module()


def test_an_unknown_capability_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBP_FAST_CPU_CAPABILITY", "avx1024")
    with pytest.raises(ValueError, match="'avx1024'; it must be one of baseline, avx2, avx512"):
        native.load_cpu.__wrapped__()


def test_the_cuda_backend_is_refused_where_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch, installed: Path
) -> None:
    monkeypatch.setattr(native.torch.version, "cuda", "13.0")
    monkeypatch.setattr(native.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_load", lambda name: native.Availability(True, ""))
    source = installed / "probe.cpp"
    source.write_text('extern "C" const char* sbp_fast_cuda_probe() { return ANSWER; }\n')
    command = [cuda_source.gxx(), "-shared", "-fPIC", str(source)]

    (installed / "libsbp_fast_cuda.so").unlink()
    target = ["-o", str(installed / "libsbp_fast_cuda.so")]
    subprocess.run([*command, '-DANSWER="no kernel image"', *target], check=True)
    usable, reason = native.load_cuda.__wrapped__()
    assert not usable
    assert "kernels do not run here: no kernel image. It was built with old; use a" in reason


def test_the_cuda_library_needs_nothing_but_torch_and_says_little() -> None:
    path = native.FOLDER / "libsbp_fast_cuda.so"
    if not path.exists():
        pytest.skip("the cuda library was not built")
    nm = cuda_source.tool("nm", package="Debian's binutils")
    readelf = cuda_source.tool("readelf", package="Debian's binutils")
    exported = subprocess.check_output([nm, "-D", "--defined-only", path], text=True)
    ours = [line.split()[-1] for line in exported.splitlines() if "sbp_fast" in line]
    assert sorted(ours) == ["sbp_fast_copy_engine", "sbp_fast_cuda_probe"]
    needed = subprocess.check_output([readelf, "-d", path], text=True)
    assert "[libtorch_cuda.so]" in needed
    assert "libcudart" not in needed
