"""What this package relies on in SGLang besides its hooks, read from its own sources so that no list falls behind.

A name that is imported, a method that is overridden, a member of an imported class that is used, a setting that is
read or held to a rule. Each is a dotted path that a release has or has not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import freekv_patches
import sglang_freekv
from sglang_freekv.serving.support import RULES
from sglang_freekv.tested_release import WRITTEN_FOR, module_name
from tools.sglang_releases.release import is_for_types

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_ATTENTION = "sglang.srt.layers.attention.attention_registry"

# What no import and no class shows.
_ELSEWHERE = {
    "sglang.srt.plugins.GENERAL_PLUGINS_GROUP": "entry point group",
    "sglang.srt.plugins.PLATFORM_PLUGINS_GROUP": "entry point group",
    f"{_ATTENTION}.create_flashinfer_backend": "registered attention",
    f"{_ATTENTION}.create_torch_native_backend": "registered attention",
    "sglang.srt.managers.scheduler.Scheduler.release_host_resources": "calls the cache",
}


def find_seams(release: str) -> dict[str, str]:
    """Dotted path -> how it is used, for all of this package but what is written for another release.

    Some candidates are our own methods, not SGLang's.
    """
    found: dict[str, str] = {}
    others = {module_name(other) for other in WRITTEN_FOR if other != release}
    files = [
        file for package in (sglang_freekv, freekv_patches) for file in Path(package.__file__).parent.rglob("*.py")
    ]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(files) if file.stem not in others]
    classes = {name: node for tree in trees for name, node in _classes(tree).items()}
    for tree in trees:
        found |= _Source(tree, classes).seams() | found
    settings = {f"{_SERVER_ARGS}.{rule.field}": "setting" for rule in RULES}
    return found | settings | _ELSEWHERE


class _Source:
    """One of our files."""

    def __init__(self, tree: ast.Module, classes: Mapping[str, ast.ClassDef] | None = None) -> None:
        self.tree = tree
        self._ours = {**(classes or {}), **_classes(tree)}  # by name, of all files

    def seams(self) -> dict[str, str]:
        """Dotted path -> how it is used. The first use counts, and being there at run time counts more than a type."""
        found: dict[str, str] = {}
        for path, use in (*self._overrides(), *self._members()):
            found.setdefault(path, use)
        for path, use in self._imported.values():
            found.setdefault(path, use)
        return found

    @cached_property
    def _imported(self) -> dict[str, tuple[str, str]]:
        """Local name -> path in SGLang, and whether it is imported or only a type."""
        types = {id(n) for branch in ast.walk(self.tree) if _is_types(branch) for n in ast.walk(branch)}
        names = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sglang":
                use = "type" if id(node) in types else "import"
                for alias in node.names:
                    path = f"{node.module}.{alias.name}"
                    # A class may be imported for types at the top, and in a function.
                    if names.get(alias.name, (path, "type"))[1] == "type":
                        names[alias.name] = path, use
        return names

    def _overrides(self) -> Iterator[tuple[str, str]]:
        """Methods of classes whose base is SGLang's; those that the base lacks are ours."""
        for node in _classes(self.tree).values():
            methods = [name for source in self._with_our_bases(node) for name in _methods(source)]
            for base in map(ast.unparse, node.bases):
                if base in self._imported:
                    yield from ((f"{self._imported[base][0]}.{method}", "override") for method in methods)

    def _with_our_bases(self, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        yield node
        for base in map(ast.unparse, node.bases):
            if (ours := self._ours.get(base.rpartition(".")[2])) is not None:
                yield from self._with_our_bases(ours)

    def _members(self) -> Iterator[tuple[str, str]]:
        """Members of imported classes: of parameters that are annotated with one, and of the class itself."""
        yield from self._used_by(self.tree, {name: path for name, (path, use) in self._imported.items()})
        for function in ast.walk(self.tree):
            if isinstance(function, ast.FunctionDef):
                arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
                annotated = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation is not None}
                typed = {arg: self._imported[name][0] for arg, name in annotated.items() if name in self._imported}
                # Whatever it came from, and whether or not it is annotated.
                yield from self._used_by(function, {"server_args": _SERVER_ARGS, **typed})

    @staticmethod
    def _used_by(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[str, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not node.attr.startswith("_freekv"):
                holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
                if holder in names and (isinstance(node.value, ast.Name) or holder == "server_args"):
                    use = "setting" if names[holder] == _SERVER_ARGS else "member"
                    yield f"{names[holder]}.{node.attr}", use


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _methods(node: ast.ClassDef) -> list[str]:
    """Names of methods, also of those that are assigned."""
    defined = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
    assigned = [target.id for item in node.body if isinstance(item, ast.Assign) for target in item.targets]
    return defined + assigned


def _is_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and is_for_types(node)
