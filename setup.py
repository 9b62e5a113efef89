"""Puts the native libraries, which build_native.py builds, into the wheel or the source tree."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Under setuptools' build backend the folder of setup.py is not on the path.
sys.path.insert(0, str(ROOT))

import build_native  # noqa: E402


class BuildNative(build_ext):
    """Builds into the source tree for editable installs, else into the build tree."""

    def run(self) -> None:
        root = ROOT if self.inplace else Path(self.build_lib)
        build_native.build(root / "sbp_fast" / "_native", Path(self.build_temp))

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "sbp_fast" / "_native"
        return [str(path) for path in folder.glob("*")]


class PlatformWheel(bdist_wheel):
    """The prefetcher is a module for one Python; a wheel without native code serves all."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = os.environ.get("SBP_FAST_BUILD") == "none"

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.root_is_pure else tag


setup(
    # One nominal extension, so that setuptools runs build_ext and treats the wheel as a binary one.
    ext_modules=[Extension("sbp_fast._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
