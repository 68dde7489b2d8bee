"""What each hook does on a FreeKV server, and what it leaves to SGLang on a plain one."""

from __future__ import annotations

import signal
import types

import pytest

from freekv_patches import memory, plugin, requests, runner, scheduler
from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from tests.support.arguments import FREEKV, PLAIN


def refuse_with(error: Exception):
    def original(self, server_args):
        raise error

    return original


@pytest.fixture
def signals(monkeypatch) -> list[int]:
    """What the process that has started this one is sent."""
    sent: list[int] = []
    parent = types.SimpleNamespace(send_signal=sent.append)
    monkeypatch.setattr(scheduler.psutil, "Process", lambda: types.SimpleNamespace(parent=lambda: parent))
    return sent


@pytest.mark.parametrize("refusal", [MemoryError("1 TiB, lower it"), UnsupportedConfiguration("1 TiB, lower it")])
def test_a_scheduler_that_is_refused_its_memory_says_one_sentence_and_ends_the_server(refusal, signals, caplog):
    with pytest.raises(SystemExit) as end:
        scheduler.start_scheduler(refuse_with(refusal), object(), FREEKV)
    assert (end.value.code, signals) == (1, [signal.SIGQUIT])
    (record,) = caplog.records
    assert record.getMessage() == "The server cannot start. 1 TiB, lower it"
    assert record.exc_info is None


@pytest.mark.parametrize(("error", "server_args"), [(RuntimeError("a bug"), FREEKV), (MemoryError("SGLang's"), PLAIN)])
def test_every_other_failure_of_a_scheduler_is_left_to_sglang(error, server_args, signals):
    with pytest.raises(type(error)) as raised:
        scheduler.start_scheduler(refuse_with(error), object(), server_args)
    assert raised.value is error
    assert not signals


def tokenizer_manager(server_args: types.SimpleNamespace, enable_lora: bool = False) -> types.SimpleNamespace:
    server_args = types.SimpleNamespace(**vars(server_args), enable_lora=enable_lora, enable_metrics=False)
    return types.SimpleNamespace(server_args=server_args, model_config=types.SimpleNamespace(vocab_size=256))


def test_a_request_is_checked_on_a_freekv_server_and_passed_on_a_plain_one():
    bad = types.SimpleNamespace(sampling_params={"custom_params": {"freekv_budget": 5}})
    with pytest.raises(ValueError, match="freekv_budget is 5"):
        requests.check_request(tokenizer_manager(FREEKV), bad, [1, 2])
    assert requests.check_request(tokenizer_manager(PLAIN), bad, [1, 2]) is None
    unset = types.SimpleNamespace(sampling_params=None)
    assert requests.check_request(tokenizer_manager(FREEKV), unset, [0, 255]) is None
    assert requests.check_request(tokenizer_manager(FREEKV), unset, None) is None  # embeddings instead of tokens


@pytest.mark.parametrize("token", [256, -1, 1 << 70])
def test_a_token_that_the_model_does_not_have_is_refused(token):
    request = types.SimpleNamespace(sampling_params=None)
    with pytest.raises(ValueError, match=r"input_ids contains .*; give tokens of the vocabulary, 0 to 255\."):
        requests.check_request(tokenizer_manager(FREEKV), request, [1, token])
    assert requests.check_request(tokenizer_manager(PLAIN), request, [1, token]) is None
    assert requests.check_request(tokenizer_manager(FREEKV, enable_lora=True), request, [1, token]) is None


class QueuedRequest:
    """SGLang's request as its scheduler puts it into the queue."""

    def __init__(self, custom_params=None, tokens=(1, 2)):
        self.sampling_params = types.SimpleNamespace(custom_params=custom_params)
        self.origin_input_ids_unpadded, self.input_embeds, self.error = tokens, [[0.5]], None

    def set_finish_with_abort(self, error):
        self.error = error


WRONG_AT_THE_SCHEDULER = {
    "custom_params.freekv_budget is 100": QueuedRequest({"freekv_budget": 100}),
    "the unknown key 'freekv_budgets'": QueuedRequest({"freekv_budgets": 128}),
    "freekv_dump needs a server started with --freekv-debug-dump": QueuedRequest({"freekv_dump": True}),
    "input_ids contains 256": QueuedRequest(tokens=(1, 256)),
}


@pytest.mark.parametrize("error", WRONG_AT_THE_SCHEDULER)
def test_the_scheduler_finishes_a_request_that_does_not_fit_with_an_error_and_reads_no_more_of_it(error):
    req = WRONG_AT_THE_SCHEDULER[error]
    assert requests.check_queued_request(tokenizer_manager(PLAIN), req) is None and req.error is None
    assert requests.check_queued_request(tokenizer_manager(FREEKV), req) is None
    assert error in req.error
    assert req.sampling_params.custom_params is req.input_embeds is None


def test_beam_search_is_refused_as_its_sequences_have_no_windows():
    beams = types.SimpleNamespace(sampling_params={"beam_width": 4})
    with pytest.raises(ValueError, match="beam_width is 4; give 1"):
        requests.check_request(tokenizer_manager(FREEKV), beams, [1])
    assert requests.check_request(tokenizer_manager(PLAIN), beams, [1]) is None
    req = QueuedRequest()
    req.sampling_params.beam_width = 4
    requests.check_queued_request(tokenizer_manager(FREEKV), req)
    assert "beam_width is 4" in req.error
    one = types.SimpleNamespace(sampling_params={"beam_width": 1})
    assert requests.check_request(tokenizer_manager(FREEKV), one, [1]) is None


def test_the_scheduler_passes_on_a_request_that_fits_and_what_it_has_retracted():
    fits, retracted = QueuedRequest({"freekv_budget": 512, "another": 1}), QueuedRequest({"freekv_budget": 100})
    requests.check_queued_request(tokenizer_manager(FREEKV), fits)
    requests.check_queued_request(tokenizer_manager(FREEKV), retracted, is_retracted=True)
    assert fits.error is retracted.error is None
    assert fits.sampling_params.custom_params == {"freekv_budget": 512, "another": 1}


def test_a_plain_server_in_a_patched_process_gets_the_attention_of_sglang():
    factory = plugin._attention_factory(lambda runner: ("original", runner))
    runner = types.SimpleNamespace(server_args=PLAIN)
    assert factory(runner) == ("original", runner)


@pytest.mark.parametrize("is_freekv", [True, False])
def test_models_do_not_write_to_a_pool_that_has_no_token_major_buffer(is_freekv, monkeypatch):
    from sglang.srt.model_executor import forward_context

    from sglang_freekv.serving.kv_pool import FreeKVPool

    pool = object.__new__(FreeKVPool) if is_freekv else object()
    monkeypatch.setattr(forward_context, "get_token_to_kv_pool", lambda: pool)
    assert runner.enable_fused_set_kv_buffer(lambda forward_batch: True, "batch") is not is_freekv


@pytest.mark.parametrize("disable_radix_cache", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 2048])
def test_the_cache_of_either_sort_releases_the_host_store_when_the_scheduler_ends(disable_radix_cache, chunk_size):
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.runtime_context import get_context

    from sglang_freekv.serving.radix_cache import create_radix_cache

    released = []
    memory = types.SimpleNamespace(unpin=lambda: released.append(True))
    pool = types.SimpleNamespace(memory=memory)
    allocator = types.SimpleNamespace(get_kvcache=lambda: pool, device="cpu", page_size=32)
    params = CacheInitParams(
        disable=disable_radix_cache, req_to_token_pool=None, token_to_kv_pool_allocator=allocator, page_size=32
    )
    ctx = types.SimpleNamespace(
        server_args=PLAIN,
        params=params,
        disable_radix_cache=disable_radix_cache,
        effective_chunked_prefill_size=chunk_size,
        enable_hierarchical_cache=False,
        is_hybrid_swa=False,
        is_hybrid_ssm=False,
    )
    with get_context().override_server_args(attention_backend="torch_native"):
        cache = create_radix_cache(ctx)
    ending = types.SimpleNamespace(hisparse_coordinator=None, decode_offload_manager=None, tree_cache=cache)
    Scheduler.release_host_resources(ending)
    assert released == [True]
    assert cache.disable is disable_radix_cache
    assert cache.report() == {"tree_tokens": 0, "tree_protected_tokens": 0, "tree_evicted_tokens": 0}


def test_the_state_of_a_server_adds_up_with_a_session_that_waits_for_its_next_turn():
    pool = types.SimpleNamespace(report=lambda: {"host_tokens": 320})
    self = types.SimpleNamespace(
        server_args=FREEKV,
        token_to_kv_pool_allocator=types.SimpleNamespace(get_kvcache=lambda: pool, available_size=lambda: 128),
        tree_cache=types.SimpleNamespace(report=lambda: {"tree_tokens": 96}),
        pool_stats_observer=types.SimpleNamespace(session_held_tokens=lambda: 96),
    )
    result = types.SimpleNamespace(internal_state={})
    scheduler.report_internal_state(result, self, None)
    state = result.internal_state["freekv"]
    assert state["host_free_tokens"] + state["tree_tokens"] + state["session_tokens"] == state["host_tokens"]


def test_the_pool_is_as_wide_as_the_request_table_and_takes_the_plan_along(monkeypatch):
    from sglang.srt.server_args import ServerArgs

    from sglang_freekv.serving import kv_pool

    monkeypatch.setattr(kv_pool, "FreeKVPool", lambda *arguments: arguments)
    server_args = ServerArgs(model_path="dummy", page_size=32)
    server_args._freekv, server_args._freekv_plan = FreeKVConfig(), "plan"
    configurator = types.SimpleNamespace(
        server_args=server_args,
        device="cuda",
        pool_page_size=32,
        model_config=types.SimpleNamespace(context_len=8192),
        layer_info=types.SimpleNamespace(start_layer=0, end_layer=32),
    )
    plan, max_context, *rest = memory.build_kv_pool(None, configurator, max_total_num_tokens=1)
    assert (plan, rest) == ("plan", ["cuda", 0, 32])
    assert max_context > 8192
    assert not hasattr(server_args, "_freekv_plan")


def test_a_freekv_server_captures_its_graphs_above_the_side_streams_and_a_plain_one_as_sglang_does(monkeypatch):
    from sglang.srt import runtime_context

    monkeypatch.setattr(runner.torch.cuda, "Stream", lambda priority=0: ("stream", priority))
    captured_on = []
    for server_args in (FREEKV, PLAIN):
        monkeypatch.setattr(runtime_context, "get_server_args", lambda args=server_args: args)
        for given in (None, "SGLang's"):
            runner.capture_above_side_streams(captured_on.append, given)
    (_, priority), *others = captured_on
    assert priority < 0, "the side streams have 0, the lowest"
    assert others == ["SGLang's", None, "SGLang's"]
