"""With this folder on PYTHONPATH Python finds no installed package but those of a bare machine.

They are torch, Triton, pytest, what these depend on, and NumPy: Triton's interpreter is made of it, which stands in for
a GPU in a rehearsal.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder

_PACKAGES = {
    *("torch", "torchgen", "functorch", "triton", "nvidia", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"),
    *("filelock", "fsspec", "typing_extensions", "setuptools", "_distutils_hack", "pkg_resources", "numpy"),
    *("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments"),
}


class BareMachine(PathFinder):
    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = super().find_spec(name, path, target)
        is_other = path is None and spec is not None and name not in _PACKAGES and _is_installed(spec)
        return None if is_other else spec


def _is_installed(spec: ModuleSpec) -> bool:
    """Whether all of it is; the parts of a namespace may lie in several places."""
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
    return bool(places) and all("site-packages" in place for place in places)


sys.meta_path[sys.meta_path.index(PathFinder)] = BareMachine
