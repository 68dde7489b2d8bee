"""A release of SGLang, read without importing it: its own wheel is enough, none of its dependencies is needed.

Names are resolved in the sources: modules, re-exports, classes with the members of their bases, attributes that a
method assigns. What depends on a condition at import time is taken to be there.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Definition(NamedTuple):
    """Where a name is bound."""

    node: ast.AST  # a function, a class, an assignment, or an import of something outside SGLang
    module: str
    owner: ast.ClassDef | None = None  # the class whose member it is


class Release:
    """One SGLang.

    Parameters
    ----------
    root : pathlib.Path or zipfile.Path
        The folder that holds the package ``sglang``: site-packages, or the root of a wheel.
    version : str
    """

    def __init__(self, root: Path | zipfile.Path, version: str) -> None:
        self.root, self.version = root, version
        self._module = cache(self._parse)
        self._bindings = cache(self._find_bindings)

    @classmethod
    def installed(cls) -> Release:
        """The one in this environment."""
        found = distribution("sglang")
        return cls(Path(found.locate_file("")), found.version)

    @classmethod
    def from_wheel(cls, wheel: Path) -> Release:
        """Read a file such as ``sglang-0.5.17-py3-none-any.whl``."""
        return cls(zipfile.Path(zipfile.ZipFile(wheel)), wheel.name.split("-")[1])

    def describe(self, path: str) -> str | None:
        """Say what a dotted path is: a function's signature, ``class``, a constant's value, or ``name``.

        None where SGLang has no such name.
        """
        if (found := self.find(path)) is None:
            return None
        node, name = found.node, path.rpartition(".")[2]
        if isinstance(node, _FUNCTIONS):
            returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
            return f"({ast.unparse(node.args)}){returns}"
        if isinstance(node, ast.ClassDef):
            return f"(self, {', '.join(self._fields(found))})" if name == "__init__" else "class"
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        return repr(value.value) if isinstance(value, ast.Constant) else "name"

    def find(self, path: str) -> Definition | None:
        """Resolve a dotted path; None where SGLang has no such name."""
        parts = path.split(".")
        for length in range(len(parts), 0, -1):  # the longest part that is a module
            module = ".".join(parts[:length])
            if (tree := self._module(module)) is not None:
                found: Definition | None = Definition(tree, module)
                for name in parts[length:]:
                    found = None if found is None else self._member(found, name)
                return found
        return None

    def _parse(self, module: str) -> ast.Module | None:
        folder = self.root.joinpath(*module.split("."))
        for file in (folder / "__init__.py", folder.parent / f"{folder.name}.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return ast.Module([], []) if folder.is_dir() else None  # a package without __init__.py

    def _member(self, owner: Definition, name: str) -> Definition | None:
        if isinstance(owner.node, ast.Module):
            return self._of_module(owner.module, name)
        return self._of_class(owner, name) if isinstance(owner.node, ast.ClassDef) else None

    def _of_module(self, module: str, name: str) -> Definition | None:
        names, starred = self._bindings(module)
        if name in names:
            node = names[name]
            if not isinstance(node, ast.ImportFrom):
                return Definition(node, module)
            source = self._source_of(node, module)
            original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
            is_inside = source.partition(".")[0] == "sglang"
            return self.find(f"{source}.{original}") if is_inside else Definition(node, module)
        if self._module(f"{module}.{name}") is not None:
            return Definition(self._module(f"{module}.{name}"), f"{module}.{name}")
        found = (self._of_module(source, name) for source in starred if self._module(source) is not None)
        return next(filter(None, found), None)

    def _of_class(self, owner: Definition, name: str) -> Definition | None:
        """As Python looks it up, depth first, and then among what methods assign to ``self``."""
        classes = list(self._with_bases(owner))
        for one in classes:
            found = dict(_bound_by(one.node.body))
            if name in found:
                return Definition(found[name], one.module, one.node)
            if name == "__init__" and _is_dataclass(one.node):
                return one
        for one in classes:
            for node in ast.walk(one.node):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
                    return Definition(node, one.module, one.node)
        return None

    def _with_bases(self, owner: Definition) -> Iterator[Definition]:
        yield owner
        for base in (*owner.node.bases, *self._collected(owner)):
            found = self.find(f"{owner.module}.{ast.unparse(base)}") if _is_dotted(base) else None
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self._with_bases(found)

    def _collected(self, owner: Definition) -> list[ast.expr]:
        """Classes whose fields a class takes over without being derived from them: `ServerArgs`, from 0.5.20 on."""
        names, _ = self._bindings(owner.module)
        listed = names.get("_INPUT_NAMESPACES") if owner.node.name == "ServerArgs" else None
        return listed.value.elts if isinstance(listed, ast.Assign) else []

    def _fields(self, owner: Definition) -> list[str]:
        """Parameters of the constructor that `dataclass` writes, by name and annotation."""
        fields = {}
        for one in reversed(list(self._with_bases(owner))):
            for statement in one.node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    fields[statement.target.id] = ast.unparse(statement.annotation)
        return [f"{name}: {annotation}" for name, annotation in fields.items()]

    def _find_bindings(self, module: str) -> tuple[dict[str, ast.AST], list[str]]:
        """Names that a module binds, and the modules from which it imports everything."""
        names, starred = {}, []
        for name, node in _bound_by(self._module(module).body):
            if name == "*":
                starred.append(self._source_of(node, module))
            # ServerArgs is a class that a call then turns into another; its members are those of the class.
            elif not (isinstance(names.get(name), ast.ClassDef) and isinstance(node, ast.Assign)):
                names[name] = node
        return names, starred

    def _source_of(self, node: ast.ImportFrom, module: str) -> str:
        """Absolute name of the module from which a statement imports."""
        if not node.level:
            return node.module
        is_package = self.root.joinpath(*module.split("."), "__init__.py").is_file()
        parts = module.split(".") if is_package else module.split(".")[:-1]
        package = parts[: len(parts) + 1 - node.level]
        return ".".join([*package, node.module] if node.module else package)


def is_same(recorded: str, found: str) -> bool:
    """Compare two descriptions; a signature may be recorded as `inspect` writes it.

    Sources tell neither the module of an annotation nor whether it is a string, so both are left out. A recorded
    signature that ends in "..." is compared by its beginning.
    """
    if not recorded.startswith("("):
        return found == recorded
    recorded, found = (re.sub(r"(\w+\.)+(?=\w)|['\"\s]", "", text) for text in (recorded, found))
    return found.startswith(recorded.removesuffix("...")) if recorded.endswith("...") else found == recorded


def _bound_by(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names bound by the statements and by their branches, in order; annotations' imports are not executed."""
    for node in statements:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((part.id, node) for part in ast.walk(target) if isinstance(part, ast.Name))
        elif isinstance(node, ast.If) and is_for_types(node):
            yield from _bound_by(node.orelse)
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _bound_by(getattr(node, block, []))


def is_for_types(node: ast.If) -> bool:
    """Whether a branch exists for type checkers only."""
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _is_dotted(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_dotted(node.value))


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
