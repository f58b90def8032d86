"""Thin driver: hands the native module to CMake and ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds ``latentdem_ext._C`` with the one CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build with ninja, then put the module where setuptools wants it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = f"cmake-{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / "build" / os.environ.get("LATENTDEM_BUILD_NAME", name)
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DLATENTDEM_VERSION={self.distribution.get_version()}",
                f"-DLATENTDEM_CUDA={os.environ.get('LATENTDEM_CUDA', 'auto')}",
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True)
        built = next(build.glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))


setup(
    ext_modules=[Extension("latentdem_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
