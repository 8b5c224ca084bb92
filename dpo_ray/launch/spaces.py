"""Search spaces by name, found without importing Ray, which takes seconds: a misspelt one is answered at once."""

import contextlib
from importlib.util import find_spec
from pathlib import Path


def find_space(name: str) -> str:
    """The import path of a space of ``tune_spaces``, or of any importable module.

    Raises:
        ValueError: there is no such module; lists those there are.
    """
    for module in (f"tune_spaces.{name}", name) if name else ():
        with contextlib.suppress(ModuleNotFoundError):  # of the package that it would be in
            if find_spec(module) is not None:
                return module
    known = sorted(path.stem for path in Path("tune_spaces").glob("*.py") if path.stem != "__init__")
    problem = f"no search space is called {name!r}" if name else "name a search space behind the configuration"
    raise ValueError(f"{problem}; tune_spaces has: {', '.join(known) or 'none here'}")
