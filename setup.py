"""Compiles the kernels while the package is built, where there is a C++ compiler; all else is in pyproject.toml.

Without a compiler, or where a target fails, the package is built all the same: what is missing is compiled at first use
(`roundoff.numerics.build`). An editable install compiles nothing, since its source may change at any time.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "src"))
from roundoff.numerics import build


class BuildWithKernels(build_py):
    """Copies the package, and compiles one library for each target beside the source of the kernels."""

    def run(self) -> None:
        """Build as usual, then compile."""
        super().run()
        if self.editable_mode:
            return
        directory = Path(self.build_lib) / build.PACKAGED.relative_to(build.SOURCES.parents[2])
        try:
            compiler = build.find_compiler(build.COMPILERS)
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda target: build.compile_target(directory, compiler, target), build.targets()))
        except build.BuildError as error:
            print(f"roundoff: {error}; the kernels will be compiled at first use")


class PlatformWheel(bdist_wheel):
    """A wheel for one platform, because it holds compiled libraries, but for every Python."""

    def finalize_options(self) -> None:
        """Mark the wheel as one that depends on the platform."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, this platform."""
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
