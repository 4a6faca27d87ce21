"""Checks for names of other libraries that are not public and that this package needs.

Each list of names is checked when the folder that uses the library is imported, so that a version without them is an
error with the fix at once, and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version


def check_names(library: str, names: Mapping[object, Sequence[str]], install: str) -> None:
    """Refuse a version of a library that lacks some of these names.

    Args:
        library: its name on the package index.
        names: owner (a module or a class) -> names that it must have.
        install: what to install instead, as pip takes it.

    Raises:
        ImportError: with what is missing, and the fix.
    """
    missing = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, needed in names.items()
        for name in needed
        if not hasattr(owner, name)
    ]
    if missing:
        raise ImportError(
            f"swiftmoe_lightning uses names of {library} that are not public, and {library} {version(library)} lacks "
            f"{', '.join(missing)}. Install one that has them: pip install '{install}' (FAQ: missing-names)"
        )
