"""What a room that patches foreign modules would replace, without replacing it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def recorded(module: ModuleType, function: Callable[[], None]) -> dict[str, Any]:
    """Run ``function`` of ``module`` with assignments recorded instead of made; values by the name of their place."""
    replaced: dict[str, Any] = {}

    def record(owner: Any, name: str, value: Any) -> None:
        label = f"{getattr(owner, '__name__', owner)}.{name}"
        assert hasattr(owner, name), f"{label} is replaced, but it does not exist"
        replaced[label] = value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "setattr", record, raising=False)
        function()
    return replaced
