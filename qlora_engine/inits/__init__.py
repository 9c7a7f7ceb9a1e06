"""Initialisations of adapters: one file a method, found by looking into this folder.

To add one, add a file that binds ``METHOD``. ``initialise`` is what callers use: it runs a method, folds the
layer's scaling, stores, and measures the error of what is stored.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from qlora_engine.errors import InputError
from qlora_engine.inits.fold import Initialised, embedding_factors, initialise, initialise_many, moments
from qlora_engine.inits.method import InitRequest, Method, Solution

__all__ = [
    "InitRequest",
    "Initialised",
    "Method",
    "Solution",
    "embedding_factors",
    "get",
    "initialise",
    "initialise_many",
    "moments",
    "names",
]


@functools.cache
def _methods() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{info.name}"), "METHOD", None)
        if method is not None:
            found[method.name] = method
    return found


def names() -> list[str]:
    """The names of all methods, sorted; ``pissa_niter_N`` is understood, too."""
    return sorted(_methods())


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: no such method.
    """
    methods = _methods()
    if name in methods:
        return methods[name]
    for method in methods.values():
        if method.variant is not None and name.startswith(f"{method.name}_"):
            return method.variant(name)
    raise InputError(f"unknown initialisation {name!r}; known: {', '.join(names())}")
