"""Find what documents say in code style and the code does not have. Standard library only; SGLang is read as text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PACKAGES = {"sglang_freekv": ROOT, "freekv_kernels": ROOT / "kernels", "freekv_patches": ROOT / "patches"}
_PACKAGES |= dict.fromkeys(("benchmarks", "tests", "tools"), ROOT)
_FOLDERS = ("sglang_freekv", "kernels", "patches", "tools", "benchmarks", "tests", "docs")
# Generated: what they name is SGLang's, or was there when they were made.
_GENERATED = ("tools/sglang_suite/results.md", "tools/sglang_releases/compatibility.md", "benchmarks/results/*.md")
_GENERATED_PART = re.compile(r"<!-- (?!end)[^>]*-->.*?<!-- end -->", re.DOTALL)
# What speaks of planted names, and must not vouch for them.
_PLANTED = (Path(__file__), ROOT / "tests/test_documents.py")
# Names that are right and in no file of ours: of the reader's own files, of every program.
_NOWHERE = {"chats.json", "--help"}

_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_BLOCK = re.compile(r"(?:^(?: {4}|\t).*\n?)+", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
_FILE = re.compile(r"[\w.*-]+\.(py|md|json|jsonl|yml|toml|svg|png|service|txt|safetensors)$")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*$")


def documents() -> list[Path]:
    """Every document that people write."""
    found = [*ROOT.glob("*.md"), *(path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    return [path for path in found if not any(path.match(pattern) for pattern in _GENERATED)]


def wrong_names(text: str, folder: Path = ROOT) -> list[str]:
    """What a document in `folder` names that does not exist: paths, modules, members, names, flags, targets of make.

    In spans of code style everything counts, in indented blocks the flags, modules and targets of commands.
    """
    text = _GENERATED_PART.sub("", text)
    spans = _SPAN.findall(_BLOCK.sub("", text))
    wrong = [word for span in spans for word in _words(span) if not _exists(word, folder)]
    for command in [*spans, *_BLOCK.findall(text)]:
        wrong += [flag for flag in _FLAG.findall(command) if not _is_flag(flag)]
        wrong += [
            f"make {target}" for target in re.findall(r"\bmake ([a-z][a-z-]+)", command) if target not in _targets()
        ]
        modules = re.findall(r"python -m ([\w.]+)", command)
        wrong += [module for module in modules if module.split(".")[0] in _PACKAGES and not _is_module(module)]
    return wrong


def broken_links(text: str, folder: Path) -> list[str]:
    """Links of a document in `folder` to files and headings that do not exist; other machines are not asked."""

    def leads_nowhere(link: str) -> bool:
        path, _, anchor = link.partition("#")
        if path and not (folder / path).exists():
            return True
        return bool(anchor) and anchor not in _anchors((folder / path).read_text() if path else text)

    return [link for link in _LINK.findall(text) if "://" not in link and leads_nowhere(link)]


def _anchors(text: str) -> set[str]:
    """Of headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _words(span: str) -> Iterator[str]:
    """The names in a span: a span of one word is one; of commands and messages, what cannot be a plain word."""
    span = re.sub(r"<[^>]*>", "*", span)  # a placeholder
    word = re.sub(r"\[[\w:, ]*\]", "", span.strip()).removesuffix("()")
    if _NAME.match(word) or re.match(r"/\S+$", word):
        yield word
        return
    for part in re.split(r"[\s\"'=(){}\[\],;|:]+", _FLAG.sub(" ", span)):
        if "/" in part or "_" in part or _FILE.match(part):
            yield part


def _exists(word: str, folder: Path) -> bool:
    if (
        word in _NOWHERE
        or word.startswith("build/")
        or any(part.isupper() and "_" not in part for part in word.split("/"))
    ):
        return True  # an output, a placeholder
    if word.startswith("/"):
        return re.search(rf"[\"'`/ ]{re.escape(word.removesuffix('...'))}", "".join(_sources()) + _sglang()) is not None
    if "/" in word or _FILE.match(word):
        return _is_path(word, folder)
    if word.startswith("SGLANG_"):
        return re.search(rf"\b{word}\b", _sglang()) is not None
    return not _NAME.match(word) or _is_name(word) or f"sglang:{word}" in _sglang()


def _is_path(word: str, folder: Path) -> bool:
    """Of a file or folder: from the document's, from the root, or the end of just any."""
    word = word.rstrip("/")
    if any(any(base.glob(word)) for base in (folder, ROOT)):
        return True
    return any(path.endswith(f"/{word}") for path in _paths())


def _is_name(name: str) -> bool:
    """Whether code has it: a module with what follows, a class with its member, or else each of its words."""
    first, *rest = name.split(".")
    if first in _PACKAGES:
        return _is_module(name)
    if first in _classes():
        return all(word in _classes()[first] for word in rest)
    return all(word in _vocabulary() for word in (first, *rest))


def _is_module(name: str) -> bool:
    """Whether it is a module, or something that a module names."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = _PACKAGES[parts[0]].joinpath(*parts[:n])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.is_file():
            return all(word in _names(file) for word in parts[n:])
        if path.is_dir():
            return n == len(parts)
    return False


def _is_flag(flag: str) -> bool:
    """Whether our code or SGLang's has it, as it stands or as the name of a setting."""
    if flag in _NOWHERE or flag.removeprefix("--freekv-") in _own_flags():
        return True
    pattern = re.compile(rf"{flag}(?![\w-])")
    is_setting = re.search(rf"^    {flag[2:].replace('-', '_')}:", _sglang(), re.MULTILINE)
    return bool(is_setting or pattern.search(_sglang()) or any(pattern.search(text) for text in _sources()))


@cache
def _own_flags() -> list[str]:
    return re.findall(r"_flag\(\s*\"([a-z-]+)\"", (ROOT / "sglang_freekv/config.py").read_text())


@cache
def _paths() -> list[str]:
    paths = [path for folder in _FOLDERS for path in (ROOT / folder).rglob("*")]
    return [f"/{path.relative_to(ROOT)}" for path in paths if "__pycache__" not in path.parts]


@cache
def _python_files() -> list[Path]:
    return [path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.py") if path not in _PLANTED]


@cache
def _other_sources() -> list[Path]:
    operations = ROOT / "sglang_freekv/operations"
    others = [*operations.glob("*.yml"), *operations.glob("*.service"), operations / "Dockerfile"]
    return [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "benchmarks/needle/model/training.jsonl", *others]


@cache
def _sources() -> list[str]:
    return [path.read_text() for path in [*_python_files(), *_other_sources()]]


@cache
def _sglang() -> str:
    """Where SGLang, which is not imported, names its flags, endpoints, environment variables and metrics."""
    folder = Path(find_spec("sglang").submodule_search_locations[0])
    names = ["server_args.py", "entrypoints/http_server.py", "environ.py", "observability/metrics_collector.py"]
    names = [*(f"srt/{name}" for name in names), "bench_serving.py"]
    of_flags = sorted((folder / "srt/arg_groups/fields").glob("*.py"))  # in releases whose flags are not in one file
    return "\n".join(path.read_text() for path in [*(folder / name for name in names), *of_flags])


@cache
def _targets() -> list[str]:
    return re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@cache
def _nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


@cache
def _names(file: Path) -> frozenset[str]:
    """Names that a file uses or makes, and its texts without blanks; comments and docstrings are neither."""
    names: set[str] = set()
    for node in _nodes(file):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                names.update(value.split("."))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value.strip()):
            names.update(re.findall(r"[A-Za-z_]\w*", node.value))
    return frozenset(names)


@cache
def _vocabulary() -> frozenset[str]:
    words = {word for path in _python_files() for word in (path.stem, *_names(path))}
    for path in _other_sources():
        words.update(re.findall(r"[A-Za-z_]\w*", path.read_text()))
    return frozenset(words)


@cache
def _classes() -> dict[str, set[str]]:
    """Class of ours -> the names in the files that define one of that name."""
    members: dict[str, set[str]] = {}
    for path in _python_files():
        for node in _nodes(path):
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(_names(path))
    return members
