"""A function of the user's that makes rows of ours of rows of any kind: `map: ./my_rows.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .row_values import RowError, kind_of
from .spec import TrainError

HINT = "The function takes a row (a dict) and returns a row of a known format, a list of such rows, or None to leave it out."


def split_map(text: str) -> tuple[Path, str]:
    """ "/folder/my_rows.py:function" -> its two parts."""
    path, _, function = text.rpartition(":")
    return Path(path), function


def load_map(text: str) -> Callable[[Any], list[Any]]:
    """`text`, as `split_map` takes it, as a function from a row to rows. Raises TrainError; the function itself RowError.

    Side effects: the file is run, as a module under a private name, so that it can neither hide nor be hidden by another.
    """
    path, name = split_map(text)
    module_name = f"_rows_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise TrainError(f"map: {path} is not a Python file", "Write map: ./my_rows.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the user's own code: whatever it raises is told with its line
        del sys.modules[module_name]
        raise TrainError(f"map: {path} cannot be loaded: {_told(e, path)}", HINT) from e
    function = getattr(module, name, None)
    if not callable(function):
        functions = sorted(
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name
        )
        raise TrainError(f"map: {path} has no function `{name}`", f"It has: {', '.join(functions) or 'none'}. {HINT}")

    def rows_of(row: Any) -> list[Any]:
        try:
            made = function(row)
        except Exception as e:  # as above, and with the row
            raise RowError(f"map: {name} failed: {_told(e, path)}", HINT) from e
        if made is None:
            return []
        if isinstance(made, dict):
            return [made]
        if isinstance(made, list):
            return made
        raise RowError(f"map: {name} returned {kind_of(made)}", HINT)

    return rows_of


def _told(e: Exception, path: Path) -> str:
    """An error of the user's own code: its line, kind and text."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
    where = f"{path.name}:{frames[-1].lineno}: " if frames else ""
    return f"{where}{type(e).__name__}: {e}"
