"""Imports run one way: each room of the house may import the rooms below it, and none above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"freekv_kernels": ROOT / "kernels", "sglang_freekv": ROOT, "freekv_patches": ROOT / "patches"}

# Room -> the rooms that it may import besides itself, in the order of the floors. A package's own files are the room of
# its name.
ROOMS: dict[str, set[str]] = {}
ROOMS["freekv_kernels"] = set()
ROOMS["sglang_freekv"] = set()  # config, flags, request_params, tested_release
ROOMS["sglang_freekv.releases"] = {"sglang_freekv"}
ROOMS["sglang_freekv.memory"] = {"freekv_kernels", "sglang_freekv"}
ROOMS["sglang_freekv.attention"] = {"freekv_kernels", "sglang_freekv.memory"}
ROOMS["sglang_freekv.algorithm"] = {*ROOMS["sglang_freekv.memory"], "sglang_freekv.memory", "sglang_freekv.attention"}
ROOMS["sglang_freekv.testing"] = {*ROOMS["sglang_freekv.algorithm"], "sglang_freekv.algorithm"}
ROOMS["sglang_freekv.cpu"] = {"sglang_freekv"}
ROOMS["sglang_freekv.serving"] = {
    *ROOMS["sglang_freekv.algorithm"],
    "sglang_freekv.algorithm",
    "sglang_freekv.releases",
}
ROOMS["sglang_freekv.operations"] = {"sglang_freekv.serving"}
ROOMS["freekv_patches"] = {"sglang_freekv", "sglang_freekv.releases", "sglang_freekv.serving"}
ROOMS["sglang_freekv.doctor"] = {*ROOMS["freekv_patches"], "sglang_freekv.memory", "freekv_patches"}

# Rooms that run without SGLang, in tests and in a notebook.
WITHOUT_SGLANG = [
    "freekv_kernels",
    "sglang_freekv",
    "sglang_freekv.memory",
    "sglang_freekv.attention",
    "sglang_freekv.algorithm",
    "sglang_freekv.operations",
]


def room_of(module: str) -> str | None:
    """The innermost room that a dotted module path is in; None for other packages."""
    parts = module.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((path for path in paths if path in ROOMS), None)


def files_of(room: str) -> list[Path]:
    folder = SOURCES[room.split(".")[0]].joinpath(*room.split("."))
    files = list(folder.rglob("*.py"))
    return [file for file in files if room_of(dotted(file)) == room]


def dotted(file: Path) -> str:
    root = next(root for name, root in SOURCES.items() if file.is_relative_to(root / name))
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(file: Path) -> Iterator[str]:
    """What a file imports anywhere, functions and type checking included; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_rooms_below_it_only(room):
    assert files_of(room)
    imported = {room_of(module) for file in files_of(room) for module in imported_modules(file)}
    assert imported - {None, room} <= ROOMS[room]


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_may_import_is_below_it(room):
    order = list(ROOMS)
    assert all(order.index(below) < order.index(room) for below in ROOMS[room])


@pytest.mark.parametrize("room", ["freekv_kernels", "sglang_freekv", "freekv_patches"])
def test_the_product_imports_neither_tests_nor_tools_nor_benchmarks(room):
    folder = SOURCES[room] / room
    imported = {module.split(".")[0] for file in folder.rglob("*.py") for module in imported_modules(file)}
    assert not imported & {"tests", "tools", "benchmarks"}


def test_tools_and_benchmarks_do_not_import_the_tests():
    for folder in ("tools", "benchmarks"):
        files = list((ROOT / folder).rglob("*.py"))
        assert files
        assert not {file for file in files for module in imported_modules(file) if module.split(".")[0] == "tests"}


@pytest.mark.parametrize("room", WITHOUT_SGLANG)
def test_the_memory_side_and_the_algorithm_import_no_sglang(room):
    assert not {
        file.name for file in files_of(room) for module in imported_modules(file) if module.split(".")[0] == "sglang"
    }


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sglang_freekv", {"sglang", "torch", "freekv_patches"}),
        ("sglang_freekv.config", {"sglang", "torch", "freekv_patches"}),
        ("freekv_patches.plugin", {"sglang", "torch"}),
        ("freekv_kernels", {"sglang", "sglang_freekv"}),
    ],
)
def test_importing_a_light_module_stays_light(module, absent):
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not absent & set(loaded.stdout.split())


@pytest.mark.parametrize("room", ["sglang_freekv.memory", "sglang_freekv.attention", "sglang_freekv.algorithm"])
def test_after_start_up_the_geometry_alone_is_asked_for_what_the_config_says_too(room):
    asked = [
        f"{file.name}:{node.lineno}"
        for file in files_of(room)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("page_size", "key_bits")
        if ast.unparse(node.value).rpartition(".")[2] == "config"
    ]
    assert asked == []
