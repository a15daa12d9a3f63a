"""Where a wheel has the app: app.py, pages/ and assets/ are installed under `transact_core/_app`.

So no package of a common name as `pages` lies in site-packages. Everything else about the package
stands in pyproject.toml.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

APP = "transact_core._app"


class BuildApp(build_py):
    """Of the modules in the root folder, takes app.py alone."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [each for each in modules if package != APP or each[1] == "app"]


library = find_packages(include=["transact_core", "transact_core.*"])
pages = find_packages(include=["pages", "pages.*"])

setup(
    cmdclass={"build_py": BuildApp},
    packages=[*library, APP, *(f"{APP}.{name}" for name in pages)],
    package_dir={APP: ".", **{f"{APP}.{name}": name.replace(".", "/") for name in pages}},
    package_data={
        APP: ["assets/*.svg", "assets/*.css", "assets/*.json", ".streamlit/config.toml"],
        f"{APP}.pages.live": ["*.js", "*.css", "*.html"],
        f"{APP}.pages.report": ["*.html"],
    },
)
