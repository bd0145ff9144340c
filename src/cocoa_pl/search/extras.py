"""A package's name in, the package out, which the extra `search` brings."""

from __future__ import annotations

import importlib
from typing import Any

from cocoa_pl.errors import UserError


def extra(name: str, *, wanted_by: str, otherwise: str = "") -> Any:
    """Import a package only where it is used.

    Args:
        wanted_by: what needs it.
        otherwise: what else a user may do.

    Raises:
        UserError: without it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{wanted_by} needs {name}: pip install 'cocoa_pl[search]'{otherwise}"
        ) from error
