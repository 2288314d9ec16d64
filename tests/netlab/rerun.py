"""Repeats what a starved emulator has spoilt."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tests.netlab.errors import RunVoid

P = ParamSpec("P")
R = TypeVar("R")


def rerun_if_void(attempts: int = 3) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Call the function again when it raises RunVoid, `attempts` times in all; the last RunVoid is passed on."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for _ in range(attempts - 1):
                try:
                    return function(*args, **kwargs)
                except RunVoid:
                    continue
            return function(*args, **kwargs)

        return wrapper

    return decorate
