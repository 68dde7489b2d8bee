"""Debug dump: what the windows of chosen requests held, step by step, for bug reports.

One file per request and rank, one JSON object per line: a header, the end of the prompt, decode steps. It holds page
numbers and lengths, no tokens and no keys or values, so it can be sent to others.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.releases import release
from sglang_freekv.request_params import request_dump_interval

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

FORMAT = 2
MAX_FILE_BYTES = 16 << 20
MAX_FILES = 64  # since start-up: one GiB where all are full


class DumpFile:
    """The dump of one request; ends where it is full."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.num_steps = 0  # seen, written or not
        self.is_full = False
        self._left = MAX_FILE_BYTES
        self.append(header)

    def append(self, record: dict[str, Any]) -> None:
        """Write a line; in place of the one that would make the file too long, that it ends here."""
        line = json.dumps(record, separators=(",", ":")) + "\n"
        if len(line) > self._left:
            self.is_full = True
            line = json.dumps({"event": "full", "max_file_bytes": MAX_FILE_BYTES}) + "\n"
            logger.warning(f"FreeKV debug dump: {self.path} is full; later steps are left out")
        self._left -= len(line)
        with self.path.open("a") as file:
            file.write(line)


class DebugDump:
    """Writes the dumps of one rank. Reading windows waits for the device: a batch with such a request is slower.

    Parameters
    ----------
    folder : Path
        Exists; see `support.check_resolved`.
    rank : int
        Of tensor parallelism; its files name it.
    """

    def __init__(self, folder: Path, memory: KVMemory, rank: int) -> None:
        self._folder, self._memory, self._rank = folder, memory, rank
        self._files: dict[str, DumpFile] = {}  # by request
        self._wanted: dict[int, tuple[Req, int]] = {}  # row -> request, and every how many steps

    def begin_batch(self, reqs: Iterable[Req]) -> None:
        """Note which requests of the batch ask for dumps."""
        self._wanted = {}
        for req in reqs:
            interval = request_dump_interval(self._memory.config, req.sampling_params.custom_params)
            if interval is not None:
                self._wanted[release.row_of(req)] = req, interval

    def end_batch(self, batch: Batch, flags: list[FlagList] | None = None) -> None:
        """Write the requests noted: what this batch, of requests that have their prompt, has left.

        Parameters
        ----------
        flags : list of FlagList, optional
            Of a decode step; None after prefill.
        """
        if not self._wanted:
            return
        for index, row in enumerate(batch.rows.tolist()):
            if row in self._wanted and (file := self._file_of(self._wanted[row][0])) is not None:
                is_due = flags is None or file.num_steps % self._wanted[row][1] == 0
                file.num_steps += flags is not None
                if is_due and not file.is_full:
                    event = "prompt" if flags is None else "decode"
                    file.append({"event": event} | self._describe(batch, index, flags))

    def write_failure(self, error: Exception, batch: Batch, flags: list[FlagList] | None = None) -> Path:
        """Write every request of a batch whose audit failed; returns the file."""
        path = self._folder / f"{_now()}-audit-failure-rank{self._rank}.jsonl"
        file = DumpFile(path, self._header() | {"error": str(error)})
        for index, row in enumerate(batch.rows.tolist()):
            if row > 0 and not file.is_full:
                file.append({"event": "audit failure"} | self._describe(batch, index, flags))
        return path

    def _file_of(self, req: Req) -> DumpFile | None:
        """The request's file; None where there are too many."""
        if req.rid not in self._files and len(self._files) < MAX_FILES:
            # Clients choose the name of a request: no part of it may lead out of the folder.
            name = re.sub(r"[^A-Za-z0-9_-]", "_", str(req.rid))[:64]
            path = self._folder / f"{_now()}-{len(self._files):02d}-{name}-rank{self._rank}.jsonl"
            request = {"request": req.rid, "num_prompt_tokens": len(req.origin_input_ids)}
            self._files[req.rid] = DumpFile(path, self._header() | request)
            logger.info(f"FreeKV debug dump: {path}")
            if len(self._files) == MAX_FILES:
                logger.warning(f"FreeKV debug dump: that was the last of {MAX_FILES} files; restart for more")
        return self._files.get(req.rid)

    def _header(self) -> dict[str, Any]:
        memory, g = self._memory, self._memory.geometry
        return {
            "event": "start",
            "format": FORMAT,
            "rank": self._rank,
            "config": {name: value for name, value in asdict(memory.config).items() if name != "debug_dump"},
            "geometry": asdict(g) | {"dtype": str(g.dtype).removeprefix("torch."), "codec": g.codec.name},
            "host_pages": memory.host.num_host_pages - 1,
            "device_blocks": memory.blocks.num_blocks,
        }

    def _describe(self, batch: Batch, index: int, flags: list[FlagList] | None) -> dict[str, Any]:
        """What one request of a batch attends to, in this step and in the next."""
        memory, page_size = self._memory, self._memory.geometry.page_size
        num_pages = int(batch.num_pages[index])
        pages = batch.page_table[index, :num_pages]
        filled = memory.host.filled[pages].tolist()
        return {
            "step": int(batch.step),
            "row": int(batch.rows[index]),
            "num_tokens": page_size * (num_pages - 1) + filled[-1] if filled else 0,
            "num_pages": num_pages,
            "num_pages_next": int(batch.num_pages_next[index]),
            "budget_pages": batch.budget_pages[index].tolist(),
            "host_page_runs": _runs(pages.tolist()),
            "not_full": [[page, n] for page, n in enumerate(filled) if n != page_size],
            "counters": memory.counters.as_dict(),
            "layers": [self._describe_layer(batch, index, number, flags) for number in range(len(memory.layers))],
        }

    def _describe_layer(self, batch: Batch, index: int, number: int, flags: list[FlagList] | None) -> dict[str, Any]:
        """Windows by KV head, in logical pages; `absent` are those of them without a block."""
        memory, layer = self._memory, self._memory.layers[number]
        if not layer.kind.selects:
            return {"layer": number, layer.kind.name: True}
        pages, step = batch.page_table[index, : int(batch.num_pages[index])], int(batch.step)
        is_resident = (layer.store.table[pages] >= 0).tolist()  # [num_pages][num_kv_heads]
        described: dict[str, Any] = {"layer": number}
        for name, half in (("front", Half.FRONT), ("back", Half.BACK)):
            padded = layer.windows[half.indices(step)[0], batch.rows[index]].tolist()
            described[name] = windows = [[page for page in window if page >= 0] for window in padded]
            # A page that only the next step opens has no host page yet.
            described[f"{name}_absent"] = [
                [page for page in window if page < len(pages) and not is_resident[page][head]]
                for head, window in enumerate(windows)
            ]
        if flags is not None:
            described["corrected"] = flags[number].is_flagged.view(-1, memory.geometry.num_kv_heads)[index].tolist()
        return described


def _runs(pages: list[int]) -> list[list[int]]:
    """Write a list of pages as runs of consecutive ones: [first, how many]."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
