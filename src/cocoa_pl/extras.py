"""A package's name in, the package out, or a sentence that says which extra brings it."""

from __future__ import annotations

import importlib
from typing import Any

from cocoa_pl.errors import UserError


def extra(package: str, *, of: str, wanted_by: str, otherwise: str = "") -> Any:
    """Import a package only where it is used.

    Args:
        of: the extra of this project that brings it.
        wanted_by: what needs it.
        otherwise: what else a user may do.

    Raises:
        UserError: without it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{wanted_by} needs {package}: pip install 'cocoa_pl[{of}]'{otherwise}"
        ) from error
