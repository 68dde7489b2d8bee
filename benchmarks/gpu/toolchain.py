"""Where compilers find CUDA: FlashInfer's and SGLang's modules are compiled and linked when they are first used.

Both take the folder above the `nvcc` on PATH for the toolkit, and link with `-lcudart -lcuda`. Where nvcc is a wrapper
there is no library beside it; a machine that has only a driver names its library libcuda.so.1; and headers of cuRAND
may be a package's. What is compiled already, in FlashInfer's `data/aot` or in the caches, needs none of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

_USUAL = (Path("/usr/local/cuda"), Path("/opt/cuda"))
_LIBRARIES = tuple(Path(folder) for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64"))


def compiler_environment(
    caches: Path, given: Mapping[str, str], usual: Iterable[Path] = _USUAL, libraries: Iterable[Path] = _LIBRARIES
) -> dict[str, str]:
    """Variables to add to `given`, the environment, so that modules compile and link; links are made below `caches`.

    Parameters
    ----------
    usual : folders that may be a toolkit
    libraries : folders that may have the driver's library
    """
    found: dict[str, str] = {}
    if toolkit := _toolkit(given, usual):
        found["CUDA_HOME"] = str(toolkit)
        if not (toolkit / "include/curand_kernel.h").exists() and (headers := _link_headers(caches / "include")):
            found["CPATH"] = _joined(headers, given.get("CPATH"))
    if driver := _link_driver(caches / "lib", libraries):
        found["LIBRARY_PATH"] = _joined(driver, given.get("LIBRARY_PATH"))
        found["FLASHINFER_EXTRA_LDFLAGS"] = f"{given.get('FLASHINFER_EXTRA_LDFLAGS', '')} -L{driver}".strip()
    return found


def _toolkit(given: Mapping[str, str], usual: Iterable[Path]) -> Path | None:
    """The first that has both a compiler and what it links with."""
    candidates = [Path(given["CUDA_HOME"])] if given.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc", path=given.get("PATH")):
        candidates.append(Path(nvcc).resolve().parents[1])
    whole = (path for path in (*candidates, *usual) if (path / "bin/nvcc").exists())
    return next((path for path in whole if (path / "lib64/libcudart.so").exists()), None)


def _link_headers(folder: Path) -> Path | None:
    """Only cuRAND's: other headers beside them may be of another release than the compiler."""
    spec = find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]
    headers = [header for place in places for header in sorted(place.glob("*/include/curand*.h"))]
    return _linked(folder, headers) if headers else None


def _link_driver(folder: Path, libraries: Iterable[Path]) -> Path | None:
    """A folder with a libcuda.so, where there is only a libcuda.so.1; None where it is there, or no driver is."""
    libraries = list(libraries)
    if any((place / "libcuda.so").exists() for place in libraries):
        return None
    driver = next((place / "libcuda.so.1" for place in libraries if (place / "libcuda.so.1").exists()), None)
    return None if driver is None else _linked(folder, [driver], name="libcuda.so")


def _linked(folder: Path, files: list[Path], name: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder / (name or file.name)
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    return folder


def _joined(first: Path, others: str | None) -> str:
    return os.pathsep.join([str(first), *filter(None, [others])])
