"""Phase kernels: every op at real sizes, as one of several in a CUDA graph, with a cold L2: time, bytes, share of peak.

Bytes are what the op cannot do without: each input and output once. An op on the host store is held against the link,
any other against the memory of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.session import Failures, Session
from benchmarks.gpu.timing import Stopwatch
from freekv_kernels import GROUP_PAGES, REFERENCE, Ops, triton_ops
from sglang_freekv.testing.kernel_inputs import Call, KernelInputs

SIZES = ((8, 32768), (1, 32768), (1, 131072), (32, 32768))  # batch, context; those of a usual server come first
REHEARSED_SIZES = ((1, 320),)
# Their lists are in any order and their choices free: what they do is checked by tests/kernels.
_FREE = {"list_candidates", "lookup_blocks", "claim_blocks", "fetch_blocks", "forget_blocks"}
_SHARES = {"share_pages", "correct_windows"}
_READ_BLOCKS = _SHARES | {"append_tokens"}  # where their references read the host store
_LAYERS = 2  # KernelInputs asks for two; more would only take memory


def run(session: Session) -> None:
    stopwatch, ops, failures = Stopwatch(session.device), triton_ops(), Failures(session)
    peak = measure_peak(session, stopwatch)
    one = torch.zeros(1, device=session.device)
    session.record("empty_kernel", stopwatch.slope(one.zero_).median * 1e6, "us")
    for batch_size, context in REHEARSED_SIZES if session.is_rehearsal else SIZES:
        if not session.has_time(6, f"batch {batch_size}, context {context}"):
            break
        inputs = build_inputs(session, batch_size, context)
        for op in Ops._fields:
            with failures.kept(f"{op}, batch {batch_size}, context {context}"):
                for kind, call in getattr(inputs, op)().items():
                    measure(session, stopwatch, getattr(ops, op), op, kind, call, inputs, peak)
        inputs.memory.unpin()
        del inputs, call  # before the next, which are as large
    failures.raise_first()


def build_inputs(session: Session, batch_size: int, context: int) -> KernelInputs:
    return KernelInputs(
        session.shape.geometry(_LAYERS),
        batch_size=batch_size,
        context_tokens=context,
        config=session.config,
        max_context=min(session.shape.max_position, max(context, 512) * 2),
        device=session.device,
    )


def check(session: Session) -> None:
    """Phase op-checks: each op whose result is determined gives what its reference gives on the CPU, at a small size.

    What is timed later is compiled here, while nothing is.
    """
    failures = Failures(session)
    inputs = build_inputs(session, *(REHEARSED_SIZES[0] if session.is_rehearsal else (2, 8192)))
    for op in [op for op in Ops._fields if op not in _FREE]:
        for kind, call in getattr(inputs, op)().items():
            with failures.kept(f"{op}, {kind}"):
                difference = _difference_from_reference(session, inputs, op, call)
                session.check(f"{op}, {kind}, is its reference", not difference, difference)
    inputs.memory.unpin()
    failures.raise_first()


def _difference_from_reference(session: Session, inputs: KernelInputs, op: str, call: Call) -> str:
    args, kwargs = call.args, dict(call.kwargs)
    if op == "score_pages":  # a tensor of its own would hold anything beyond the pages of a request
        shape = (inputs.num_rows, inputs.geometry.group_size, inputs.memory.max_pages)
        kwargs["out"] = torch.zeros(shape, device=session.device)
    elif op in _READ_BLOCKS:
        _fill_blocks(inputs)
    on_cpu = _to_cpu((args, kwargs))
    with _restored(call):
        getattr(triton_ops(), op)(*args, **kwargs)
        getattr(REFERENCE, op)(*on_cpu[0], **on_cpu[1])
        found, expected = (_defined(op, arguments, inputs) for arguments in (args, on_cpu[0]))
        return _difference((found, kwargs), (expected, on_cpu[1]))


@contextmanager
def _restored(call: Call) -> Iterator[Callable[[], None]]:
    """Within, the call may be repeated after what it yields; at the end what the call changes is as it was."""
    saved = [tensor.clone() for tensor in call.changed]

    def restore() -> None:
        for tensor, before in zip(call.changed, saved, strict=True):
            tensor.copy_(before)

    yield restore
    restore()


def _defined(op: str, args: tuple, inputs: KernelInputs) -> tuple:
    """The arguments of a call after it, without what it leaves undefined."""
    if op == "select_pages":  # the scores are its workspace
        return args[1:]
    if op in _SHARES:  # shares are where the masses of the group's first head were, up to the last page
        return (args[0][:, 0, : inputs.num_pages], *args[1:])
    return args


def _fill_blocks(inputs: KernelInputs) -> None:
    """Resident blocks hold what the host has."""
    owner, store = inputs.layer.blocks.owner[0], inputs.layer.store
    blocks = (owner >= 0).nonzero().flatten()
    pairs = owner[blocks].cpu()
    pages, heads = pairs // inputs.geometry.num_kv_heads, pairs % inputs.geometry.num_kv_heads
    store.block_kv[blocks] = store.host_kv[pages, heads].to(store.block_kv.device)


def _to_cpu(value: Any) -> Any:
    """A copy in CPU memory of all tensors of nested tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _to_cpu(item) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [_to_cpu(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _difference(found: Any, expected: Any, path: str = "") -> str:
    """Where two nests of tensors differ; empty where they do not. A list in any order is one."""
    if isinstance(expected, torch.Tensor):
        a, b = found.detach().cpu(), expected
        if a.is_floating_point():
            is_same = torch.allclose(a.float(), b.float(), rtol=2e-3, atol=2e-2, equal_nan=True)  # tf32
        else:
            is_same = torch.equal(a, b) or torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        return "" if is_same else f"argument{path} differs"
    if isinstance(expected, dict):
        return next(filter(None, (_difference(found[k], v, f"{path}.{k}") for k, v in expected.items())), "")
    if isinstance(expected, tuple):
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (_difference(a, b, f"{path}.{i}") for i, (a, b) in pairs)), "")
    return ""


def measure(
    session: Session,
    stopwatch: Stopwatch,
    op: Callable[..., object],
    name: str,
    kind: str,
    call: Call,
    inputs: KernelInputs,
    peak: float,
) -> None:
    with _restored(call) as restore:
        timing = stopwatch.slope(lambda: op(*call.args, **call.kwargs), restore)
    num_bytes, is_link = bytes_of(name, kind, call, inputs)
    rate = num_bytes / timing.median / 1e9
    session.record(
        "kernel_time",
        round(timing.median * 1e6, 2),
        "us",
        op=name,
        kind=kind,
        batch=inputs.batch_size,
        context=inputs.context_tokens,
        p20=round(timing.p20 * 1e6, 2),
        p80=round(timing.p80 * 1e6, 2),
        mbytes=round(num_bytes / 1e6, 3),
        gbytes_per_s=round(rate, 1),
        bound="link" if is_link else "GPU memory",
        share_of_peak=-1 if is_link else round(rate / peak, 3),
    )


def bytes_of(op: str, kind: str, call: Call, inputs: KernelInputs) -> tuple[int, bool]:
    """Bytes that one call moves at least, and whether they cross the link."""
    g, rows, width = inputs.geometry, inputs.num_rows, inputs.width
    pages = rows * inputs.num_pages
    share = inputs.is_flagged.float().mean().item() if "flagged" in kind or "due rows" in kind else 1.0
    # Of a page and KV head: its bounds, and with them its codes.
    bounds, by_codes = 2 * g.head_dim, "by codes" in kind or "by mass" in kind
    codes = g.page_size * g.head_dim * g.key_bits // 8 if by_codes else 0
    token = 2 * g.num_kv_heads * g.head_dim * g.dtype.itemsize  # K and V of one token in a layer
    query = rows * g.group_size * g.head_dim * g.dtype.itemsize
    listed = next((int(x.count) for x in call.args if hasattr(x, "count") and hasattr(x, "pairs")), 0)
    if op == "recall_blocks":
        return listed * g.block_bytes, True
    if op == "fetch_blocks":
        return inputs.num_missing(kind) * g.block_bytes, True
    if op == "append_tokens":
        return inputs.batch_size * 4 * token + 4 * query, False
    if op == "store_pages":
        return len(call.args[2]) * token, True
    if op == "encode_pages":
        num_full = int((call.args[0] % g.page_size == g.page_size - 1).sum())
        return num_full * g.page_size * token // 2, True
    if op == "fill_arena":
        return len(call.args[2]) * g.page_size * 2 * token, False
    moved = {
        "write_tables": inputs.batch_size * inputs.memory.max_pages * (4 + 8),
        "list_pages": pages * (8 + 4),
        "list_candidates": pages // GROUP_PAGES * (bounds + 3 * 4 * g.group_size) + inputs.num_listed * 4,
        "score_pages": share * (inputs.num_listed if "list" in kind else pages) * (bounds + codes + 4 * g.group_size),
        "share_pages": pages * 4 * (g.group_size + 1) + rows * g.page_size * g.head_dim * g.dtype.itemsize,
        "apportion_pages": pages * 4 + rows * 8,
        "correct_windows": pages * 4 * (g.group_size + 1) + 2 * rows * width * 4,
        "select_pages": share * (pages * 4 * g.group_size + rows * width * 4),
        "lookup_blocks": rows * width * (4 + 8 + 4 + 4),
        "claim_blocks": listed * (8 + 4 + 4 + 4 + 4),
        "forget_blocks": listed * (8 + 4 + 4 + 4 + 4),
    }
    return int(moved[op]), False


def measure_peak(session: Session, stopwatch: Stopwatch) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    size = (1 << 20) if session.is_rehearsal else (4 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=session.device).random_()
    target = torch.empty_like(source)
    rate = 2 * size / stopwatch.time(lambda: target.copy_(source), repeats=7).median / 1e9
    session.record("device_copy", rate, "GB/s", bytes=size)
    return rate
