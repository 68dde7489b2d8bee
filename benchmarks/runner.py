"""SGLang's ModelRunner in this process, and batches as its scheduler would make them; with the plug-in or without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
from sglang.benchmark.one_batch import load_model
from sglang.srt.entrypoints.engine import Engine, _set_envs_and_config
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs

from sglang_freekv.releases import release
from sglang_freekv.serving.kv_pool import FreeKVPool


def load_runner(model: str, device: str, **keywords: object):
    """SGLang's ModelRunner with pools and attention, as `sglang.bench_one_batch` makes it; keywords of `sgl.Engine`."""
    torch.set_grad_enabled(False)
    load_plugins()
    if device == "cuda":
        keywords |= {"attention_backend": "flashinfer"}
    server_args = Engine.server_args_class(model_path=model, device=device, random_seed=0, **keywords)
    release.resolve(server_args)
    release.publish(server_args)
    _set_envs_and_config(server_args)
    return load_model(server_args, PortArgs.init_new(server_args), 0, 0)[0].torch_runner


def forward(runner, batch: ForwardBatch, rows: Sequence[int], *, is_unfinished: bool = False) -> torch.Tensor:
    """Run a batch as SGLang's worker does.

    Parameters
    ----------
    rows : sequence of int, ``[batch_size]``
        The rows of the request table, on the host.
    is_unfinished : bool
        Whether the prompt of the last request goes on after this chunk.

    Returns
    -------
    ``[batch_size, vocabulary]``
        Logits of the token after each request's last one.
    """
    is_freekv = isinstance(runner.token_to_kv_pool, FreeKVPool)
    if is_freekv:  # as the patch of SGLang's worker does around each batch
        unfinished = SimpleNamespace(rid=batch.rids[-1]) if is_unfinished else None
        reqs = [SimpleNamespace(req_pool_idx=row, kv=SimpleNamespace(req_pool_idx=row)) for row in rows]
        runner.attn_backend.begin_batch(SimpleNamespace(reqs=reqs, chunked_req=unfinished))
    logits = runner.forward(batch).logits_output.next_token_logits
    if is_freekv:
        runner.attn_backend.end_batch(batch.forward_mode)
    return logits


def decode_batch(
    runner,
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor,
    slots: torch.Tensor,
) -> ForwardBatch:
    """One decode step, with what SGLang's scheduler would say of it; lengths include the new token.

    Parameters
    ----------
    input_ids, rows, seq_lens, slots : int64, ``[batch_size]``, device
        `slots`: token slots of the new tokens.
    seq_lens_cpu : int64, ``[batch_size]``, CPU
    """
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        out_cache_loc=slots,
        positions=seq_lens - 1,
        **{release.BATCH_TOKENS: len(rows)},
        **_common(runner, input_ids, rows, seq_lens, seq_lens_cpu),
    )


def extend_batch(
    runner, input_ids: torch.Tensor, rows: torch.Tensor, prefix_lens: Sequence[int], extend_lens: Sequence[int]
) -> ForwardBatch:
    """A chunk of each request's prompt, after a prefix that is in the pool; slots come from the request table.

    Parameters
    ----------
    input_ids : int64, ``[num_tokens]``, device
        The requests' tokens, concatenated.
    rows : int64, ``[batch_size]``, device
    prefix_lens, extend_lens : sequence of int, ``[batch_size]``
    """
    device = runner.device
    prefix_lens, extend_lens = list(prefix_lens), list(extend_lens)
    lens = [prefix + extend for prefix, extend in zip(prefix_lens, extend_lens, strict=True)]
    table = runner.req_to_token_pool.req_to_token
    slots = [table[row, a:b] for row, a, b in zip(rows.tolist(), prefix_lens, lens, strict=True)]
    positions = [torch.arange(a, b, device=device) for a, b in zip(prefix_lens, lens, strict=True)]
    seq_lens = torch.tensor(lens)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        out_cache_loc=torch.cat(slots).long(),
        positions=torch.cat(positions),
        **{release.BATCH_TOKENS: len(input_ids)},
        extend_num_tokens=len(input_ids),
        extend_seq_lens=torch.tensor(extend_lens, device=device),
        extend_prefix_lens=torch.tensor(prefix_lens, device=device),
        extend_start_loc=torch.tensor([0, *accumulate(extend_lens)][:-1], device=device),
        extend_seq_lens_cpu=extend_lens,
        extend_prefix_lens_cpu=prefix_lens,
        extend_logprob_start_lens_cpu=[0] * len(lens),
        **_common(runner, input_ids, rows, seq_lens.to(device), seq_lens),
    )


def _common(runner, input_ids, rows, seq_lens, seq_lens_cpu) -> dict[str, object]:
    """What both kinds of batches say."""
    return {
        "batch_size": len(rows),
        "input_ids": input_ids,
        "req_pool_indices": rows,
        "seq_lens": seq_lens,
        "seq_lens_sum": int(seq_lens_cpu.sum()),
        "seq_lens_cpu": seq_lens_cpu,
        "orig_seq_lens": seq_lens,
        "rids": [str(i) for i in range(len(rows))],
        "lora_ids": [None] * len(rows),
        "spec_algorithm": runner.spec_algorithm,
        "capture_hidden_mode": CaptureHiddenMode.NULL,
    }
