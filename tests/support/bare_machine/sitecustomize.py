"""With this folder on PYTHONPATH Python finds no installed package but those of a bare machine.

They are torch, Triton, pytest and what these depend on. NumPy is there for them, as Triton's interpreter is made of it,
which stands in for a GPU in a rehearsal; the repository's own files do not find it.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_ROOT, _SITE = str(Path(__file__).parents[3]), "site-packages"
_PACKAGES = {
    *("torch", "torchgen", "functorch", "triton", "nvidia", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"),
    *("filelock", "fsspec", "typing_extensions", "setuptools", "_distutils_hack", "pkg_resources"),
    *("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments"),
}


class BareMachine(PathFinder):
    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = super().find_spec(name, path, target)
        if spec is None or path is not None or not _is_installed(spec) or name in _PACKAGES:
            return spec
        importer = _importer()
        is_own = importer.startswith(_ROOT) and _SITE not in importer
        return spec if name == "numpy" and not is_own else None


def _is_installed(spec: ModuleSpec) -> bool:
    return any(_SITE in place for place in (spec.origin or "", *(spec.submodule_search_locations or [])))


def _importer() -> str:
    """File of the code that imports now."""
    frame = sys._getframe(1)
    while "importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename


sys.meta_path[sys.meta_path.index(PathFinder)] = BareMachine
