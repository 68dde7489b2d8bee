"""Compatibility: the installed SGLang is the recorded one, sources tell what imports tell, and a drift is found."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pkgutil
import subprocess
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from freekv_patches.registry import ALL_PATCHES
from tools.sglang_releases import compatibility, seams
from tools.sglang_releases.compatibility import Record, open_release, table
from tools.sglang_releases.release import Release, is_same

RENEW = "what we rely on has changed: python -m tools.sglang_releases.compatibility --write"


@pytest.fixture(scope="module")
def installed() -> Release:
    return Release.installed()


@pytest.fixture(scope="module")
def record() -> Record:
    return Record.load()


def test_the_installed_release_is_the_recorded_one(installed, record):
    assert installed.version == record.release
    assert record.differences(installed) == {}


def test_everything_we_use_is_recorded(installed, record):
    assert Record.of(installed).seams == record.seams, RENEW


def test_every_name_we_import_exists(installed):
    used = {path: use for path, use in seams.find_seams().items() if use in ("import", "type", "entry point group")}
    assert len(used) > 30
    assert [path for path in used if installed.find(path) is None] == []


def test_the_document_is_the_one_that_the_record_makes(record):
    assert compatibility.TABLE.read_text() == table(record), RENEW


@pytest.mark.parametrize("patch", ALL_PATCHES, ids=lambda patch: patch.target.rpartition("srt.")[2])
def test_a_hooks_target_reads_as_it_imports(patch, installed):
    described = installed.describe(patch.target)
    assert is_same(patch.signature, described)
    if not patch.signature.endswith("..."):
        assert is_same(str(inspect.signature(patch.find())), described)


def test_whatever_is_recorded_can_be_imported(record):
    """Attributes that a method assigns have no value on the class, and fields without a default neither."""
    for path, seam in record.seams.items():
        if seam["found"] != "name":
            found = pkgutil.resolve_name(path)
            is_code = inspect.isclass(found) if seam["found"] == "class" else callable(found)
            assert is_code or isinstance(found, property) or repr(found) == seam["found"], path


def test_all_functions_of_the_hooked_modules_have_the_parameters_that_imports_show(installed):
    """Not only the targets: a release that moves a target may give it any of these forms."""
    compared = 0
    for name in sorted({installed.find(patch.target).module for patch in ALL_PATCHES}):
        for path, function in _functions(import_module(name)):
            described = installed.describe(path)
            assert described is not None, path
            arguments = ast.parse(f"def f{described}: ...").body[0].args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            imported = inspect.signature(function).parameters.values()
            assert names == [p.name for p in imported if p.kind not in variadic], path
            compared += 1
    assert compared > 500


def _functions(module):
    """Path and function for what a module and its classes define under its own name."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner, path in ((module, module.__name__), *((c, f"{module.__name__}.{c.__name__}") for c in classes)):
        for name, value in vars(owner).items():
            function = getattr(value, "__func__", value)
            is_ours = inspect.isfunction(function) and function.__code__.co_filename == module.__file__
            if is_ours and function.__name__ == name:
                yield f"{path}.{name}", function


SOURCES = {
    "sglang/__init__.py": "",
    "sglang/core/__init__.py": "from .parts import Part as Public\nfrom sglang.core.more import *\n",
    "sglang/core/more.py": "def starred(x=1): ...\n",
    "sglang/core/parts.py": """
from __future__ import annotations
import dataclasses
from typing import TYPE_CHECKING
import torch
from torch import nn

if TYPE_CHECKING:
    from nowhere import ForTypesOnly
else:
    Fallback = None

GROUP = "a.group"

class Base:
    def inherited(self, a, *, b: int = 2) -> str: ...

@dataclasses.dataclass
class Part(Base, nn.Module):
    name: str
    size: int = 0

    @classmethod
    def build(cls, other: "Part"): ...

    def fill(self):
        self.contents, x = [], 0

if torch.cuda.is_available():
    def chosen(x): ...
else:
    def chosen(x): ...
""",
}


@pytest.fixture(params=["folder", "wheel"])
def made_up(request, tmp_path) -> Release:
    """A release with each form that a name can take, unpacked and packed."""
    if request.param == "folder":
        for name, text in SOURCES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return Release(tmp_path, "1.0")
    return Release.from_wheel(wheel(tmp_path, SOURCES))


def wheel(folder: Path, sources: dict[str, str], version: str = "1.0") -> Path:
    path = folder / f"sglang-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in sources.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sglang.core.Public", "class"),
        ("sglang.core.parts.Part.build", "(cls, other: 'Part')"),
        ("sglang.core.Public.inherited", "(self, a, *, b: int=2) -> str"),
        ("sglang.core.parts.Part.__init__", "(self, name: str, size: int)"),
        ("sglang.core.parts.Part.size", "0"),
        ("sglang.core.parts.Part.name", "name"),
        ("sglang.core.parts.Part.contents", "name"),
        ("sglang.core.starred", "(x=1)"),
        ("sglang.core.parts.chosen", "(x)"),
        ("sglang.core.parts.GROUP", "'a.group'"),
        ("sglang.core.parts.Fallback", "None"),
        ("sglang.core.parts.torch", "name"),
        ("sglang.core.parts.ForTypesOnly", None),
        ("sglang.core.parts.Part.gone", None),
        ("sglang.core.gone.Part", None),
        ("elsewhere.Part", None),
    ],
)
def test_a_name_is_found_as_python_would_find_it(path, expected, made_up):
    assert made_up.describe(path) == expected


def test_a_signature_is_compared_without_what_sources_do_not_tell():
    assert is_same("(self, x: 'Optional[a.b.C]' = None) -> 'D'", "(self, x: Optional[C]=None) -> m.D")
    assert is_same("(self, model: ...", "(self, model: str, more: int)")
    assert not is_same("(self, x)", "(self, x, y)")
    assert not is_same("(self, x: 'int')", "(self, x: 'str')")
    assert not is_same("(self, x = 1)", "(self, x = 2)")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def inherited(self, a", "def inherited(self, a, c", {"inherited": "(self, a, c, *, b: int=2) -> str"}),
        ("def inherited", "def renamed", {"inherited": None}),
        ("size: int = 0", "size: int = 1", {"size": "1"}),
        ("a.group", "b.group", {"GROUP": "'b.group'"}),
        ("class Part(", "class Piece(", {"Part": None, "inherited": None, "size": None}),
        ("import torch\n", "import torch  # the same\n", {}),
    ],
)
def test_a_drift_is_found_and_nothing_else(old, new, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "HOOKS", {})
    paths = ["GROUP", "Part", "Part.inherited", "Part.size"]
    before = Release.from_wheel(wheel(tmp_path, SOURCES))
    found = {f"sglang.core.parts.{p}": before.describe(f"sglang.core.parts.{p}") for p in paths}
    record = Record("1.0", {path: {"use": "import", "found": what} for path, what in found.items()})
    sources = {name: text.replace(old, new) for name, text in SOURCES.items()}
    after = Release.from_wheel(wheel(tmp_path, sources, "1.1"))
    differences = {path.rpartition(".")[2]: what for path, what in record.differences(after).items()}
    assert differences == expected
    record.others["1.1"] = record.differences(after)
    row = f"| other seams, of 4 | 4 | {4 - len(expected)} |"
    assert row in table(record)


def test_a_hook_with_another_signature_counts_as_drift(record, installed, monkeypatch):
    target = ALL_PATCHES[-1].target
    monkeypatch.setitem(compatibility.HOOKS, target, "(self, other)")
    assert record.differences(installed) == {target: installed.describe(target)}


def test_our_own_sources_are_read_for_every_sort_of_use():
    source = """
from typing import TYPE_CHECKING
from sglang.pools import Pool
if TYPE_CHECKING:
    from sglang.batches import Batch

class OurPool(Pool):
    get = None
    def put(self, batch: Batch):
        from sglang.late import helper
        return helper(batch.tokens, Pool.registry, self.server_args.page_size)
"""
    assert seams._Source(ast.parse(source)).seams() == {
        "sglang.pools.Pool": "import",
        "sglang.pools.Pool.get": "override",
        "sglang.pools.Pool.put": "override",
        "sglang.pools.Pool.registry": "member",
        "sglang.batches.Batch": "type",
        "sglang.batches.Batch.tokens": "member",
        "sglang.late.helper": "import",
        "sglang.srt.server_args.ServerArgs.page_size": "setting",
    }


def test_the_command_fails_where_the_installed_release_is_not_the_recorded_one(installed, record, monkeypatch, capsys):
    monkeypatch.setattr(Release, "installed", lambda: installed)
    assert compatibility.main([]) == 0
    path = next(iter(record.seams))
    seams_ = {**record.seams, path: {"use": "import", "found": "(changed)"}}
    monkeypatch.setattr(Record, "load", lambda: dataclasses.replace(record, seams=seams_))
    assert compatibility.main([]) == 1
    assert f"{path}: recorded for {record.release}, found " in capsys.readouterr().err


def test_the_command_shows_a_wheel_beside_the_recorded_release_and_writes_only_when_told(
    installed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Release, "installed", lambda: installed)
    record_file, table_file = tmp_path / "record.json", tmp_path / "table.md"
    record_file.write_text(compatibility.RECORD.read_text())
    monkeypatch.setattr(compatibility, "TABLE", table_file)
    monkeypatch.setattr(Record, "load", lambda: Record(**json.loads(record_file.read_text())))
    monkeypatch.setattr(Record, "save", lambda record: record_file.write_text(json.dumps(dataclasses.asdict(record))))
    other = str(wheel(tmp_path, SOURCES, "9.0"))
    assert compatibility.main([other]) == 0
    assert f"| hooks, of {len(ALL_PATCHES)} | {len(ALL_PATCHES)} | 0 |" in capsys.readouterr().out
    assert not table_file.exists() and "9.0" not in record_file.read_text()
    assert compatibility.main(["--write", other]) == 0
    assert "| 9.0 |" in table_file.read_text() and "9.0" in Record.load().others


def test_a_version_is_downloaded_without_its_dependencies_and_a_failure_is_a_sentence(tmp_path, monkeypatch):
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        wheel(tmp_path, SOURCES, "9.0")
        return subprocess.CompletedProcess(command, 0, "", "no such release")

    monkeypatch.setattr(compatibility.subprocess, "run", pip)
    assert open_release("9.0", tmp_path).version == "9.0"
    assert {"download", "--no-deps", "sglang==9.0"} <= set(commands[0])
    with pytest.raises(SystemExit, match=r"^error: 9.1 is neither a wheel nor a release .*no such release$"):
        open_release("9.1", tmp_path)
