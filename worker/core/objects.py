"""What a setting names in the user's code, as "app.db:make_sessions"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

from worker.core.errors import ModuleNotLoaded, SettingsError, nearest
from worker.core.registry import Registry, load_modules


def load_callable(setting: str, name: str | None) -> Callable[..., Any] | None:
    """The function that a setting names; None when it names none.

    Args:
        setting: the setting, for messages.
        name: its value, as in "app.main:startup".

    Raises:
        ModuleNotLoaded: the module cannot be imported.
        SettingsError: there is no such name in it, or it cannot be called.

    """
    if name is None:
        return None
    module_name, _, path = name.partition(":")
    try:
        load_modules((module_name,), Registry())  # its jobs, if it has some, are registered by jobs.modules alone
    except ModuleNotLoaded as error:
        raise ModuleNotLoaded(f"{setting}: {error}") from error
    module = sys.modules[module_name]
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError:
        raise SettingsError(f"{setting}: {module_name} has no {path!r}{nearest(path, vars(module))}") from None
    if not callable(found):
        raise SettingsError(f"{setting}: {name} is a {type(found).__name__}; name a function")
    return found
