"""Make ``AutoModel...from_pretrained`` read the native format once qlora_engine is imported, at no cost
until it does.

transformers looks a quantisation method up in two tables. The entries put there import the real classes
when they are asked for; if transformers is not imported yet, they are put there when it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLES = "transformers.quantizers.auto"
_METHOD = "qlora_engine"


class _Config:
    """Stands for NativeConfig."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        """The real config."""
        from .transformers_quantizer import NativeConfig

        return NativeConfig.from_dict(values, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Stands for NativeQuantizer."""
    from .transformers_quantizer import NativeQuantizer

    return NativeQuantizer(*args, **kwargs)


def _enter(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_METHOD, _Config)
    tables.AUTO_QUANTIZER_MAPPING.setdefault(_METHOD, _quantizer)


class _Then(Loader):
    """Runs a module as its own loader does, then enters the method into its tables."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, and the two entries."""
        self._loader.exec_module(module)
        _enter(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def install() -> None:
    """Enter the method into transformers' tables, now or when they are imported."""
    tables = sys.modules.get(_TABLES)
    if tables is not None:
        _enter(tables)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
