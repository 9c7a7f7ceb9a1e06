"""Who may import whom: the picture in README.md, "How it is built", checked from the source."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch

import pytest

from tests.architecture.source_tree import ROOT, modules, ours

# Computes and nothing else: no files, no formats of files, no printing, no model library.
ARITHMETIC = [
    "quant.spec",
    "quant.packing",
    "quant.tables",
    "quant.scales",
    "quant.formats*",
    "quant.backends*",
    "quant.tensor",
    "quant.linear*",
    "qlora_engine.lowrank",
    "qlora_engine.hessian",
    "qlora_engine.rounding*",
    "qlora_engine.allocate",
    "qlora_engine.inits*",
]
NOT_ARITHMETIC = {"os", "io", "json", "pathlib", "shutil", "tempfile", "safetensors", "huggingface_hub"}
NOT_ARITHMETIC |= {"click", "rich", "tqdm", "logging", "transformers", "accelerate"}
ALLOWED_ALL_THE_SAME = {
    "quant.backends.triton_common": {"os"},  # reads Triton's switch TRITON_INTERPRET
    "quant.backends.compiled": {"shutil"},  # looks whether there is a C++ compiler
}

# (importers, what they must not import, except)
FORBIDDEN = [
    ("quant*", "qlora_engine*", ()),
    ("quant.backends*", "quant.tensor", ()),
    ("quant.backends*", "quant.linear*", ()),
    ("quant.formats*", "quant.backends*", ()),
    ("quant.tensor", "quant.linear*", ()),
    ("quant.spec", "quant.tensor", ()),
    ("*", "qlora_engine.cli*", ("qlora_engine.cli*",)),
    ("qlora_engine.checkpoint", "qlora_engine.inits*", ()),
    ("qlora_engine.checkpoint", "qlora_engine.pipeline*", ()),
    ("qlora_engine.adapter_io", "qlora_engine.inits*", ()),
    ("qlora_engine.adapter_io", "qlora_engine.pipeline*", ()),
    ("qlora_engine.report", "qlora_engine.pipeline*", ()),
    ("qlora_engine.*plan", "qlora_engine.*pipeline", ()),  # what is planned writes nothing
    ("qlora_engine.*plan", "qlora_engine.workspace", ()),
    ("qlora_engine.inits*", "qlora_engine.pipeline*", ()),
    ("qlora_engine.inits*", "qlora_engine.lora", ()),
    ("qlora_engine.inits*", "qlora_engine.checkpoint", ()),
    ("qlora_engine.lora", "qlora_engine.attach", ()),
    ("qlora_engine.lora", "qlora_engine.peft_api", ()),
    ("qlora_engine.lora", "qlora_engine.pipeline*", ()),
    ("qlora_engine.attach", "qlora_engine.peft_api", ()),
    ("qlora_engine.attach", "qlora_engine.pipeline*", ()),
    ("qlora_engine.peft_api", "qlora_engine.pipeline*", ()),
]

# third-party package: the only modules that may import it
ONLY_IN = {
    "triton": ["quant.backends.triton*"],
    "bitsandbytes": ["quant.backends.bnb*", "qlora_engine.training*"],
    "peft": [],
    "matplotlib": ["qlora_engine.report*", "qlora_engine.cli.report*", "qlora_engine.training*"],
    "click": ["qlora_engine.cli*"],
    "liger_kernel": ["qlora_engine.training*"],
    "trl": ["qlora_engine.training*"],
}


def test_modules_sees_every_file() -> None:
    assert "quant.tensor" in modules()
    assert "qlora_engine.pipeline" in modules()
    assert "quant.spec" in ours(modules()["quant.tensor"].imports)


@pytest.mark.parametrize(("importers", "target", "excepted"), FORBIDDEN)
def test_dependency_direction(importers: str, target: str, excepted: tuple[str, ...]) -> None:
    wrong = [
        f"{module.name} imports {name}"
        for module in modules().values()
        if fnmatch(module.name, importers) and not any(fnmatch(module.name, e) for e in excepted)
        for name in ours(module.imports)
        if fnmatch(name, target)
    ]
    assert not wrong


def test_arithmetic_does_no_input_output() -> None:
    wrong = [
        f"{module.name} imports {', '.join(sorted(found))}"
        for module in modules().values()
        if any(fnmatch(module.name, pattern) for pattern in ARITHMETIC)
        if (found := module.third_party() & NOT_ARITHMETIC - ALLOWED_ALL_THE_SAME.get(module.name, set()))
    ]
    assert not wrong


def test_quant_knows_torch_alone() -> None:
    allowed = {"torch", "numpy", "scipy", "triton", "bitsandbytes"} | set(sys.stdlib_module_names)
    wrong = {
        module.name: sorted(module.third_party() - allowed)
        for module in modules().values()
        if module.name.split(".")[0] == "quant" and module.third_party() - allowed
    }
    assert not wrong


@pytest.mark.parametrize("package", list(ONLY_IN))
def test_optional_packages_have_one_importer(package: str) -> None:
    wrong = [
        module.name
        for module in modules().values()
        if package in module.third_party()
        and not any(fnmatch(module.name, pattern) for pattern in ONLY_IN[package])
    ]
    assert not wrong


def test_no_import_cycle() -> None:
    """Follow what is imported at once; an import inside a function cannot make a cycle."""
    edges = {name: ours(module.imports_at_once) - {name} for name, module in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                # A package's __init__ that lists its own files is how it finds them, not a cycle.
                if not name.startswith(f"{target}."):
                    visit(target, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def _loaded(statement: str, *, without: tuple[str, ...] = ()) -> set[str]:
    """Top-level modules loaded after ``statement`` in a new interpreter that lacks ``without``."""
    code = f"""
import sys
class Without:
    # Finds what a finder finds, but for packages that shall be as if they had not been installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {without!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
{statement}
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_quant_is_light() -> None:
    heavy = {"triton", "bitsandbytes", "transformers", "peft", "accelerate", "scipy"}
    assert not (_loaded("import quant") - _loaded("import torch")) & heavy


def test_import_qlora_engine_is_light() -> None:
    heavy = {"triton", "bitsandbytes", "peft", "matplotlib", "click", "trl"}
    assert not (_loaded("import qlora_engine") - _loaded("import torch")) & heavy


def test_everything_imports_without_the_extras() -> None:
    own_needs = [pattern for name in ("triton", "bitsandbytes") for pattern in ONLY_IN[name]]
    names = [
        name
        for name in modules()
        if not any(fnmatch(name, p) for p in own_needs) and not name.endswith("__main__")
    ]
    without = ("triton", "bitsandbytes", "peft", "matplotlib", "trl", "liger_kernel", "gguf", "tensorboard")
    _loaded("import " + ", ".join(names), without=without)
