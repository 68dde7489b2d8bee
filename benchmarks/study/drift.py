"""An audit of drift: how much queries and windows change from one decode step to the next.

    python -m benchmarks.study drift --model benchmarks/needle/model --out benchmarks/results

The share of flagged rows is the server's `flagged_rows / rows`: a row is one KV head of one layer at one step of a
request over its budget, and its query is compared with the previous one, at the first step with the prompt's last.
It differs in three points: the tokens are the right answers, not what the server generated; attention is dense, where a
server's later layers see what the windows of earlier ones left; and queries are float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.needle import MODEL
from benchmarks.needle.transcripts import FAMILIES, Transcript, draw_transcript
from benchmarks.records import RESULTS, RecordWriter, read_records
from benchmarks.study.capture import Layer, load_model, prefill, run_tail
from benchmarks.study.rules import EXACT, SPECULATION, Rule, select
from benchmarks.tables.kinds import pivot
from freekv_kernels import compare_queries

TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TABLES = ("cosine+cosine_p10+flagged_share+page_turnover:family,layer", "head_cosine:family,layer")


class Drift(NamedTuple):
    """One layer, over the decode steps of one or more transcripts."""

    family: str
    layer: int
    cosine: torch.Tensor  # float32, [num_heads, steps], of each query with the previous one
    similarity: torch.Tensor  # float32, [num_kv_heads, steps], as the engine averages it over the group
    turnover: torch.Tensor  # float32, [num_kv_heads, steps], share of the selected pages that the last query missed

    def flagged(self, tau: float) -> float:
        """Share of rows that a threshold flags."""
        return (self.similarity < tau).float().mean().item()


def measure_layer(layer: Layer, steps: torch.Tensor, rule: Rule, budget: int) -> tuple[torch.Tensor, ...]:
    """Cosine, similarity and turnover of one layer, as in `Drift`.

    Parameters
    ----------
    steps : int64, ``[steps]``, which tokens of the tail; not the first
    rule : Rule, of the selection; its `tau` is not used
    budget : int, tokens, less than the context
    """
    now, before = layer.q[:, steps], layer.q[:, steps - 1]
    cosine = torch.cosine_similarity(now, before, dim=-1)
    rows = (x.unflatten(0, (len(layer.k), -1)).permute(2, 0, 1, 3) for x in (now, before))
    similarity = compare_queries(*rows).T
    exact, speculative = (
        select(replace(rule, tau=tau), budget, layer.q, layer.k, steps) for tau in (EXACT, SPECULATION)
    )
    # Sink and recent pages are in both.
    num_selected = (budget - rule.sink - rule.recent) // rule.page_size
    return cosine, similarity, (exact & ~speculative).sum(-1) / num_selected


def measure(model: PreTrainedModel, transcript: Transcript, rule: Rule, budget: int) -> list[Drift]:
    """The drift of each layer on a transcript."""
    capture = run_tail(model, prefill(model, transcript.document), transcript.tail)
    return [
        Drift(transcript.family, i, *measure_layer(layer, transcript.steps, rule, budget))
        for i, layer in enumerate(capture.layers)
    ]


def merge(drifts: Sequence[Drift]) -> list[Drift]:
    """One entry per family and layer."""
    merged = []
    for key in dict.fromkeys((drift.family, drift.layer) for drift in drifts):
        same = [drift for drift in drifts if (drift.family, drift.layer) == key]
        merged.append(Drift(*key, *(torch.cat(parts, -1) for parts in list(zip(*same, strict=True))[2:])))
    return merged


def records(drifts: Sequence[Drift]) -> Iterator[tuple[str, float, dict[str, int | float | str]]]:
    """Metric, value and parameters of what is kept of a run."""
    for d in drifts:
        of_layer = {"family": d.family, "layer": d.layer}
        yield "cosine", d.cosine.mean().item(), of_layer
        yield "cosine_p10", d.cosine.quantile(0.1).item(), of_layer
        yield "page_turnover", d.turnover.mean().item(), of_layer
        for head, cosine in enumerate(d.cosine):
            yield "head_cosine", cosine.mean().item(), {**of_layer, "head": head}
        for tau in TAUS:
            yield "flagged_share", d.flagged(tau), {**of_layer, "tau": tau}


def draw(drifts: Sequence[Drift], path: Path) -> None:
    """A picture: a row per layer; the cosines of its heads, the share that each threshold flags, the turnover."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = sorted({d.layer for d in drifts})
    figure, axes = plt.subplots(len(layers), 3, figsize=(13, 3 * len(layers)), squeeze=False, layout="constrained")
    for number, (left, middle, right) in zip(layers, axes, strict=True):
        of_layer = [d for d in drifts if d.layer == number]
        cosine = torch.cat([d.cosine for d in of_layer], -1)
        left.violinplot(list(cosine.numpy()), positions=range(len(cosine)), showmeans=True)
        left.set(ylabel=f"layer {number}\ncosine", xlabel="query head", ylim=(-1.02, 1.02))
        for d in of_layer:
            middle.plot(TAUS, [d.flagged(tau) for tau in TAUS], marker="o", label=d.family)
            right.ecdf(d.turnover.flatten().numpy(), label=d.family)
        middle.set(xlabel="tau", ylabel="share of rows flagged", ylim=(0, 1.02))
        right.set(xlabel="share of the selected pages that change", ylabel="share of steps", xlim=(0, 1))
    axes[0, 1].legend()
    figure.suptitle("Adjacent decode steps: queries, corrections, pages")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of drift.jsonl and drift.png")
    parser.add_argument("--context", type=int, default=8192, help="tokens")
    parser.add_argument("--budget", type=int, default=1024, help="tokens, for the turnover of pages")
    parser.add_argument("--seeds", type=int, default=2, help="transcripts per family")


def run(args: argparse.Namespace) -> None:
    if args.budget >= args.context:
        raise SystemExit(f"--budget {args.budget} covers the context: pass less than --context {args.context}")
    model, drifts = load_model(args.model), []
    for family in tqdm(FAMILIES):
        for seed in range(args.seeds):
            drifts += measure(model, draw_transcript(family, seed, args.context), Rule(), args.budget)
    drifts = merge(drifts)
    writer = RecordWriter("drift", args.out / "drift.jsonl", module="benchmarks.study")
    for metric, value, params in records(drifts):
        writer.write(metric, value, "share", {"context": args.context, "budget": args.budget, **params})
    draw(drifts, args.out / "drift.png")
    written = read_records(writer.path)
    print(*(pivot(written, table) for table in TABLES), sep="\n")
