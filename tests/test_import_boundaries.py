"""Who may import whom: freekv_kernels <- sglang_freekv <- freekv_patches, and plugin.py alone looks back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported_packages(source: Path) -> set[str]:
    """Top-level names that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def importers_of(package: str, folder: str) -> set[str]:
    sources = list((ROOT / folder).rglob("*.py"))
    assert sources
    return {source.name for source in sources if package in imported_packages(source)}


@pytest.mark.parametrize("package", ["sglang", "sglang_freekv", "freekv_patches"])
def test_kernels_import_neither_sglang_nor_the_runtime(package):
    assert importers_of(package, "kernels/freekv_kernels") == set()


def test_only_the_plug_in_imports_the_patches():
    assert importers_of("freekv_patches", "sglang_freekv") == {"plugin.py"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sglang_freekv", {"sglang", "torch", "freekv_patches"}),
        ("sglang_freekv.config", {"sglang", "torch", "freekv_patches"}),
        ("sglang_freekv.plugin", {"sglang", "torch", "freekv_patches"}),
        ("freekv_kernels", {"sglang", "sglang_freekv"}),
    ],
)
def test_importing_a_light_module_stays_light(module, absent):
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not absent & set(loaded.stdout.split())
