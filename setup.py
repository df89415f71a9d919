"""Build step: recipes and the demo model become part of the wheel. Everything else is said in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShipped(build_py):
    """Copy `recipes/` and `models/` to `sfd/shipped/`, where `sfd.utils.shipped` finds them."""

    def run(self) -> None:
        """Build the package, then add the folders; an editable install finds them in the checkout."""
        super().run()
        if self.editable_mode:
            return
        for name in ("recipes", "models"):
            target = Path(self.build_lib) / "sfd" / "shipped" / name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithShipped})
