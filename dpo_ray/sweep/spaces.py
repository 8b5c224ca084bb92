"""Finds search spaces by name, without importing Ray, so that a misspelt name fails at once."""

import contextlib
import pkgutil
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

PACKAGES = ("tune_spaces", "dpo_ray.tune_spaces")
"""The spaces of the working directory, and those that the wheel contains."""


def find_space(name: str) -> str:
    """Import path of a module of ``tune_spaces`` or of any importable module; a ValueError lists the known spaces."""
    if name:
        own, built_in = (f"{package}.{name}" for package in PACKAGES)
        for module in (own, name, built_in):
            if _spec(module) is not None:
                return module
    problem = f"no search space is called {name!r}" if name else "name a search space after the configuration"
    raise ValueError(
        f"{problem}; accepted are {', '.join(_names()) or 'none of tune_spaces here'}, and the import path of a module "
        "of your own, such as my_spaces.wide"
    )


def _spec(module: str) -> ModuleSpec | None:
    with contextlib.suppress(ModuleNotFoundError):  # raised if the parent package does not exist
        return find_spec(module)
    return None


def _names() -> list[str]:
    folders = [
        folder for package in PACKAGES if (spec := _spec(package)) for folder in spec.submodule_search_locations or ()
    ]
    return sorted({module.name for module in pkgutil.iter_modules(folders)})
