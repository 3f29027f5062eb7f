"""What to say of a name that is not known: the one that was likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NEAR = 0.75
"""Similarity (``difflib``) from which a name is a likely slip of another; below it a suggestion misleads."""


def did_you_mean(names: Iterable[str]) -> str:
    """Return ". Did you mean X or Y?", or nothing for no names."""
    text = " or ".join(names)
    return f". Did you mean {text}?" if text else ""


def suggestion(name: object, valid: Iterable[str]) -> str:
    """Return ". Did you mean X?" for the valid name of which ``name`` is a likely slip, or nothing if there is none."""
    return did_you_mean(difflib.get_close_matches(str(name), list(valid), n=1, cutoff=_NEAR))


def suggestion_or_list(name: object, valid: Iterable[str]) -> str:
    """Return what :func:`suggestion` does, or all valid names where none is near."""
    names = sorted(valid)
    return suggestion(name, names) or f"; valid are {', '.join(names)}"
