"""Scripts for SGLang's scripted runtime: they run inside the scheduler, and each `yield` is one of its steps.

The runtime empties the server before each script.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Literal

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.environ import envs
from sglang.srt.plugins import load_plugins
from sglang.test.scripted_runtime.context import ScriptedContext
from sglang.test.scripted_runtime.req_handle import ScriptedReqHandle

from freekv_kernels import Count

Script = Generator[None, None, None]

CHUNK_TOKENS = 128
_MAX_STEPS = 2000
_STRICT_WHEN_BUSY = envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY
_STRICT_WHEN_IDLE = envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE


def launch_with_plugins(**arguments: Any) -> None:
    """Start the server as `python -m sglang.launch_server` does; the runtime's own launcher loads no plug-ins."""
    load_plugins()
    launch_server(Engine.server_args_class(**arguments))


def prompt_runs_in_chunks(ctx: ScriptedContext) -> Script:
    """A prompt longer than a chunk is prefilled in chunks."""
    req = _start(ctx, prompt_tokens=3 * CHUNK_TOKENS + 1)
    yield from _finish([req])
    assert req.chunks_done == 4, req.chunks_done
    yield from _assert_whole(ctx)


def decoding_goes_on_after_anothers_chunks(ctx: ScriptedContext) -> Script:
    """What a request decodes is the same when another one is prefilled in chunks in the meantime."""
    alone = yield from _outputs(ctx, [_start(ctx, 100)])
    yield from _flush(ctx)
    first = _start(ctx, 100)
    yield from _decode(first, 5)
    second = _start(ctx, 3 * CHUNK_TOKENS, token=2)
    outputs = yield from _outputs(ctx, [first, second])
    assert second.chunks_done == 3
    assert outputs[0] == alone[0]
    yield from _assert_whole(ctx)


def exhausted_pages_make_requests_wait_or_retract(ctx: ScriptedContext) -> Script:
    """Requests that do not fit the free pages together all finish, with the outputs of an empty server."""
    unhurried = []
    for token in range(1, 7):
        unhurried += yield from _outputs(ctx, [_start(ctx, 96, token)])
        yield from _flush(ctx)
    # The pages that the runtime holds look like a leak.
    with _STRICT_WHEN_BUSY.override(0), _STRICT_WHEN_IDLE.override(False):
        ctx.exhaust_kv(leave_pages=14)
        reqs = [_start(ctx, 96, token) for token in range(1, 7)]  # of 5 pages each
        yield
        yield
        assert any(req.status == "waiting" for req in reqs)
        hurried = yield from _outputs(ctx, reqs)
        ctx._release_exhausted_pools()
    assert hurried == unhurried
    yield from _assert_whole(ctx)


def abort_in_mid_chunk(ctx: ScriptedContext) -> Script:
    """A request aborted between two chunks of its prompt gives back its row and pages."""
    req = _start(ctx, 6 * CHUNK_TOKENS)
    yield from _until(lambda: req.chunks_done == 2)
    ctx.abort(req)
    yield from _finish([req])
    assert req.chunks_done < 6
    yield from _assert_whole(ctx)


def pause(ctx: ScriptedContext, mode: Literal["retract", "in_place"]) -> Script:
    """Paused requests stand still, and continue with the outputs of requests that never paused."""
    unpaused = yield from _outputs(ctx, [_start(ctx, 70), _start(ctx, 200, token=2)])
    yield from _flush(ctx)
    reqs = [_start(ctx, 70), _start(ctx, 200, token=2)]
    for req in reqs:
        yield from _decode(req, 5)
    objects = [req.req for req in reqs]
    ctx.pause_generation(mode=mode)
    yield
    yield
    lengths = [len(req.output_ids) for req in objects]
    for _ in range(20):
        yield
    assert lengths == [len(req.output_ids) for req in objects]
    is_retracted = [req.status == "waiting" for req in reqs]
    assert is_retracted == [mode == "retract"] * 2
    ctx.continue_generation()
    assert (yield from _outputs(ctx, reqs)) == unpaused
    yield from _assert_whole(ctx)


def flush_empties_the_cache(ctx: ScriptedContext) -> Script:
    """A flush is refused while a request runs; on an idle server it frees every page."""
    req = _start(ctx, 200)
    yield from _decode(req, 5)
    ctx.flush_cache()
    outputs = yield from _outputs(ctx, [req])
    tree = ctx.scheduler.tree_cache
    assert tree.evictable_size() >= 200 // 32 * 32
    yield from _flush(ctx)
    assert ctx.engine_stats()["kv_pool_free"] == ctx.scheduler.max_total_num_tokens
    assert (yield from _outputs(ctx, [_start(ctx, 200)])) == outputs
    yield from _assert_whole(ctx)


def _start(ctx: ScriptedContext, prompt_tokens: int, token: int = 1) -> ScriptedReqHandle:
    return ctx.start_req(
        prompt_len=prompt_tokens, prompt_token=token, max_new_tokens=40, ignore_eos=True, temperature=0
    )


def _until(is_true: Callable[[], bool]) -> Script:
    for _ in range(_MAX_STEPS):
        if is_true():
            return
        yield
    raise AssertionError(f"not within {_MAX_STEPS} steps")


def _finish(reqs: list[ScriptedReqHandle]) -> Script:
    yield from _until(lambda: all(req.finished for req in reqs))


def _decode(req: ScriptedReqHandle, num_tokens: int) -> Script:
    yield from _until(lambda: req.req is not None and len(req.req.output_ids) >= num_tokens)


def _outputs(ctx: ScriptedContext, reqs: list[ScriptedReqHandle]) -> Generator[None, None, list[list[int]]]:
    """Output tokens of requests, once they have finished."""
    yield from _until(lambda: all(req.req is not None for req in reqs))
    objects = [req.req for req in reqs]  # a finished request can no longer be found
    yield from _finish(reqs)
    return [list(req.output_ids) for req in objects]


def _flush(ctx: ScriptedContext) -> Script:
    yield from _until(lambda: ctx.is_fully_idle)
    ctx.flush_cache()
    yield


def _assert_whole(ctx: ScriptedContext) -> Script:
    """On an idle server every row is free, every page is free or in the tree, and no window ever lacked a page."""
    yield from _until(lambda: ctx.is_fully_idle)
    stats, scheduler = ctx.engine_stats(), ctx.scheduler
    assert stats["req_pool_free"] == stats["req_pool_total"], stats
    tree_tokens = scheduler.tree_cache.evictable_size()
    assert scheduler.tree_cache.protected_size() == 0
    assert stats["kv_pool_free"] + tree_tokens == scheduler.max_total_num_tokens, (stats, tree_tokens)
    memory = scheduler.token_to_kv_pool_allocator.get_kvcache().memory
    memory.check_integrity()
    assert memory.counters[Count.ABSENT_PAGES] == 0
