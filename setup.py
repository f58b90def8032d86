"""Thin driver: hands the native module to CMake and ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

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


def require_built_torch(distribution: Distribution) -> None:
    """Let what is built require the release of torch that it is built against.

    torch's C++ interface changes with every release, so the module loads beside no other.  A source
    distribution is for all of them.
    """
    try:
        pin = f"torch=={version('torch').split('+')[0]}"
    except PackageNotFoundError:
        return  # CMake will say that torch is missing
    if pin not in distribution.install_requires:
        distribution.install_requires.append(pin)


class BuiltDistInfo(dist_info):
    """Metadata of a wheel or an editable installation."""

    def run(self) -> None:
        """Write it, with the torch that is here."""
        require_built_torch(self.distribution)
        super().run()


class BuiltWheel(bdist_wheel):
    """A wheel."""

    def run(self) -> None:
        """Build it, for the torch that is here."""
        require_built_torch(self.distribution)
        super().run()


setup(
    ext_modules=[Extension("latentdem_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": BuiltWheel, "dist_info": BuiltDistInfo},
)
