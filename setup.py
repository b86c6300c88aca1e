"""Installs kernels/ as utnetv2_fast.kernels and builds the C++ extension utnetv2_fast._C with CMake and Ninja."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt. The extension is optional: where it fails, setuptools warns and goes on."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            f"-S{ROOT.resolve()}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DEXTENSION_FILE_NAME={target.name}",
            f"-DEXTENSION_FOLDER={target.parent}",
        ]
        try:
            import pybind11

            subprocess.run([*configure, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"], check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            reason = "cmake failed, see above" if isinstance(error, subprocess.CalledProcessError) else error
            raise CompileError(
                f"{reason}. utnetv2-fast is installed without its C++ kernels and will run plain PyTorch on the CPU; "
                "install a C++17 compiler and install the package again to get them"
            ) from error


setup(
    packages=[*find_packages(include=["utnetv2_fast", "utnetv2_fast.*"]), "utnetv2_fast.kernels"],
    package_dir={"utnetv2_fast.kernels": "kernels"},
    ext_modules=[Extension("utnetv2_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
