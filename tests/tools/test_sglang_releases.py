"""Compatibility: the installed SGLang is the recorded one, sources tell what imports tell, and a drift is found."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pkgutil
import re
import subprocess
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from freekv_patches import registry
from freekv_patches.patch import Attribute
from freekv_patches.registry import ALL_PATCHES
from sglang_freekv.tested_release import TESTED_RELEASES, WRITTEN_FOR, module_name
from tests.support.documents import ROOT
from tools.sglang_releases import compatibility, seams
from tools.sglang_releases.compatibility import Record, hooks_of, open_release, seams_of, table
from tools.sglang_releases.release import Release, is_same

RENEW = "what we rely on has changed: python -m tools.sglang_releases.compatibility --write"


@pytest.fixture(scope="module")
def installed() -> Release:
    return Release.installed()


@pytest.fixture(scope="module")
def record() -> Record:
    return Record.load()


def test_the_installed_release_is_a_recorded_one(installed, record):
    assert list(record.tested) == list(WRITTEN_FOR)
    assert record.differences(installed, installed.version) == {}


def test_pip_installs_tested_releases_only(record):
    (sglang,) = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    known = {*record.tested, *record.others, "0.5.15.post1", "0.5.17.post1", "0.5.18.post1", "0.5.23.post1", "0.5.24"}
    assert {version for version in known if version in sglang.specifier} == set(TESTED_RELEASES)


def test_everything_we_use_is_recorded(installed, record):
    assert seams_of(installed) == record.tested[installed.version], RENEW


def test_every_name_we_import_exists(installed):
    used = {
        path: use
        for path, use in seams.find_seams(installed.version).items()
        if use in ("import", "type", "entry point group")
    }
    assert len(used) > 30
    assert [path for path in used if installed.find(path) is None] == []


def test_the_document_is_the_one_that_the_record_makes(record):
    assert compatibility.TABLE.read_text() == table(record), RENEW


@pytest.mark.parametrize("patch", ALL_PATCHES, ids=lambda patch: patch.target.rpartition("srt.")[2])
def test_a_hooks_target_reads_as_it_imports(patch, installed):
    described = installed.describe(patch.target)
    recorded = hooks_of(installed.version)[patch.target]
    assert is_same(recorded, described)
    if recorded.startswith("(") and not recorded.endswith("..."):
        assert is_same(str(inspect.signature(patch.find())), described)


def test_a_patch_that_names_releases_names_tested_ones():
    patches = [patch for module in (*registry._OF_FLAGS, *registry._OF_A_SERVER) for patch in module.PATCHES]
    named = [set(patch.signature) for patch in patches if not isinstance(patch.signature, str)]
    assert named and all(names and names <= set(WRITTEN_FOR) for names in named)


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("sglang_freekv.releases", {}),
        ("sglang_freekv.cpu.pools", {}),
        ("sglang_freekv.serving.radix_cache", {"v0_5_17"}),
    ],
)
def test_modules_of_releases_offer_the_same_names(package, extra):
    folder = Path(import_module(package).__file__).parent
    offered = {name: _public_names(folder / f"{name}.py") for name in map(module_name, WRITTEN_FOR)}
    common = set.intersection(*offered.values())
    assert common and {name for name, names in offered.items() if names != common} == set(extra)


def _public_names(file: Path) -> set[str]:
    """What a module defines itself."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]}
    return {name for name in names if not name.startswith("_")}


def test_whatever_is_recorded_can_be_imported(record, installed):
    """Attributes that a method assigns have no value on the class, and fields without a default neither."""
    for path, seam in record.tested[installed.version].items():
        if seam["found"] != "name":
            found = pkgutil.resolve_name(path)
            is_code = inspect.isclass(found) if seam["found"] == "class" else callable(found)
            is_field = isinstance(found, property) or inspect.ismemberdescriptor(found)
            assert is_code or is_field or repr(found) == seam["found"], path


def test_all_functions_of_the_hooked_modules_have_the_parameters_that_imports_show(installed):
    """Not only the targets: a release that moves a target may give it any of these forms."""
    compared = 0
    for name in sorted(
        {installed.find(patch.target).module for patch in ALL_PATCHES if not isinstance(patch, Attribute)}
    ):
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
    monkeypatch.setattr(compatibility, "hooks_of", lambda release: {})
    paths = ["GROUP", "Part", "Part.inherited", "Part.size"]
    before = Release.from_wheel(wheel(tmp_path, SOURCES))
    found = {f"sglang.core.parts.{p}": before.describe(f"sglang.core.parts.{p}") for p in paths}
    record = Record({"1.0": {path: {"use": "import", "found": what} for path, what in found.items()}})
    sources = {name: text.replace(old, new) for name, text in SOURCES.items()}
    after = Release.from_wheel(wheel(tmp_path, sources, "1.1"))
    differences = {path.rpartition(".")[2]: what for path, what in record.differences(after, "1.0").items()}
    assert differences == expected
    record.add(after)
    assert f"| other seams that fit | 4 of 4 | {4 - len(expected)} of 4 |" in table(record)
    assert f"| verdict | tested | {'refused' if expected else 'fits by reading, refused'} |" in table(record)


def test_a_release_is_read_beside_the_tested_one_that_it_is_most_like(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "hooks_of", lambda release: {})
    changed = {name: text.replace("size: int = 0", "size: int = 1") for name, text in SOURCES.items()}
    path = "sglang.core.parts.Part.size"
    tested = {}
    for version, sources in (("1.0", SOURCES), ("2.0", changed)):
        found = Release.from_wheel(wheel(tmp_path, sources, version)).describe(path)
        tested[version] = {path: {"use": "member", "found": found}}
    record = Record(tested)
    record.add(Release.from_wheel(wheel(tmp_path, changed, "1.5")))
    assert (record.like, record.others) == ({"1.5": "2.0"}, {"1.5": {}})


def test_a_hook_with_another_signature_counts_as_drift(record, installed, monkeypatch):
    target = ALL_PATCHES[-1].target
    hooks = hooks_of(installed.version) | {target: "(self, other)"}
    monkeypatch.setattr(compatibility, "hooks_of", lambda release: hooks)
    assert record.differences(installed, installed.version) == {target: installed.describe(target)}


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
    recorded = record.tested[installed.version]
    path = next(iter(recorded))
    tested = record.tested | {installed.version: {**recorded, path: {"use": "import", "found": "(changed)"}}}
    monkeypatch.setattr(Record, "load", lambda: dataclasses.replace(record, tested=tested))
    assert compatibility.main([]) == 1
    assert f"{path}: recorded for {installed.version}, found " in capsys.readouterr().err


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
    hooks = " | ".join(f"{len(hooks_of(release))} of {len(hooks_of(release))}" for release in WRITTEN_FOR)
    assert re.search(rf"\| hooks that fit \|.* {hooks} \| 0 of \d+ \|", capsys.readouterr().out) is not None
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
