"""A plug-in of SGLang's that breaks a server on demand: an oracle that cannot fail proves nothing.

The file named by the environment variable FREEKV_TEST_FAULT says which fault to commit now; empty: none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import freekv_kernels

FAULT_FILE = "FREEKV_TEST_FAULT"
STORE = "store"  # host pages hold the values of other tokens, and so do the blocks recalled from them
BLOCK = "block"  # device blocks differ from their host pages
GRACE_S = 5  # from a failed audit to the end of the server


def register() -> None:
    """SGLang calls this in each of its processes."""
    assert "sglang_freekv.memory.kv_memory" not in sys.modules, "the engine has its ops already"
    fault, ops = Path(os.environ[FAULT_FILE]), freekv_kernels.REFERENCE

    def store_pages(k, v, slots, page_starts, store):
        v = v.roll(1, 0) if fault.read_text() == STORE else v
        ops.store_pages(k, v, slots, page_starts, store)
        if fault.read_text() == BLOCK:
            blocks = store.table[slots // store.block_kv.shape[2]].unique().long()
            store.block_kv[blocks, 1] = store.block_kv[blocks, 1].roll(1, 1)

    freekv_kernels.REFERENCE = ops._replace(store_pages=store_pages)
    from sglang_freekv.serving import health  # with the engine, so after the fault

    health.GRACE_S = GRACE_S


def environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """What a server's environment needs to be broken on demand, and the file that says how.

    `folder` becomes a distribution that announces `register` to SGLang where it is on the Python path.
    """
    entry_point = f"fault = {__name__.rpartition('.')[2]}:register"  # found by PYTHONPATH, not as part of a package
    metadata = folder / "freekv_test_fault-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: freekv-test-fault\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{entry_point}\n")
    fault = folder / "fault"
    fault.write_text("")
    path = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return fault, {"PYTHONPATH": os.pathsep.join(path), FAULT_FILE: str(fault)}
