"""The exercises' marking. In a notebook: `from ldm_lessons import checks`, then `checks.lesson_00.to_pixels(mine)`.

One module a lesson, loaded when it is first named; `_core.py` says how to write one.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith("lesson_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name == f"{__name__}.{name}":
                raise AttributeError(f"There is no {name} in the checks: names look like checks.lesson_00.") from None
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
