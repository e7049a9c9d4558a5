"""Everything is in pyproject.toml; this only keeps wheels clean."""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class CleanBuild(build_py):
    """Pack the modules that the checkout has, and no others."""

    def run(self) -> None:
        # build/ may hold modules that are gone from the checkout, and setuptools would pack them.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        # The root of the repository is the package, but this file is no part of it.
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("claritycore", "setup")]


setup(cmdclass={"build_py": CleanBuild})
