"""Compare rules for selecting pages, without a server: what part of the attention they keep, what answers they cost.

    python -m benchmarks.study selection --model benchmarks/needle/model --context 8192 --budgets 512 1024

Every rule of `rules.py` runs twice: once on the queries of dense attention, whose weights say what the model looks for,
and once in the forward itself, where later layers see what the windows of earlier ones left.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.needle import MODEL
from benchmarks.needle.samples import Label
from benchmarks.needle.transcripts import FAMILIES, Transcript, draw_transcript
from benchmarks.records import RESULTS, RecordWriter, read_records
from benchmarks.study.capture import Capture, Visible, causal, load_model, prefill, run_tail
from benchmarks.study.rules import RULES, Rule, select
from benchmarks.tables.kinds import pivot

TABLE = "first+other+weight_kept+top_page:budget,rule"


def visible_by(rule: Rule, budget: int, steps: torch.Tensor) -> Visible:
    """The rule as `run_tail` takes it: decode steps see their windows, questions see everything."""

    def visible(layer: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mask = causal(k.shape[1] - q.shape[1], q.shape[1]).repeat(len(k), 1, 1)
        if layer not in rule.dense_layers:
            windows = select(rule, budget, q, k, steps).repeat_interleave(rule.page_size, -1)
            mask[:, steps] &= windows[..., : k.shape[1]]
        return mask

    return visible


def page_weights(q: torch.Tensor, k: torch.Tensor, steps: torch.Tensor, page_size: int) -> torch.Tensor:
    """Attention weight of each page under dense attention, float32 ``[num_heads, steps, pages]``."""
    num_tokens = k.shape[1]
    logits = q.unflatten(0, (len(k), -1))[:, :, steps] @ k[:, None].transpose(-1, -2)
    logits.masked_fill_(~causal(num_tokens - q.shape[1], q.shape[1])[steps], -math.inf)
    weights = (logits * q.shape[-1] ** -0.5).softmax(-1).flatten(0, 1)
    weights = torch.nn.functional.pad(weights, (0, -num_tokens % page_size))
    return weights.unflatten(-1, (-1, page_size)).sum(-1)


def kept_weight(weights: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Share of the attention that falls into the windows, float32 ``[num_heads, steps]``."""
    return (weights * windows.repeat_interleave(len(weights) // len(windows), 0)).sum(-1)


def top_page_kept(weights: torch.Tensor, windows: torch.Tensor) -> float:
    """Share of the attention to each head's heaviest page whose page is in the window."""
    top = weights.max(-1)
    is_kept = windows.repeat_interleave(len(weights) // len(windows), 0).gather(-1, top.indices[..., None])[..., 0]
    return ((top.values * is_kept).sum() / top.values.sum()).item()


def right_tokens(capture: Capture, transcript: Transcript) -> dict[str, torch.Tensor]:
    """Whether each decode step predicts its token: bool, of first tokens of a value, found by key, and of others."""
    targets, steps = torch.tensor(transcript.tail), transcript.steps
    is_right = capture.logits[steps].argmax(-1) == targets[steps + 1]
    is_jump = torch.tensor(transcript.labels)[steps + 1] == Label.JUMP
    return {"first": is_right[is_jump], "other": is_right[~is_jump]}


class Result(NamedTuple):
    """One rule at one budget on one transcript."""

    family: str
    budget: int  # tokens; 0 with dense attention
    rule: str
    right: dict[str, torch.Tensor]  # of `right_tokens`
    kept: list[torch.Tensor]  # per layer, of `kept_weight`
    top: list[float]  # per layer, of `top_page_kept`


def measure(
    model: PreTrainedModel, transcript: Transcript, rules: dict[str, Rule], budgets: Sequence[int]
) -> Iterator[Result]:
    """Dense attention first, then each rule at each budget."""
    prefix, steps = prefill(model, transcript.document), transcript.steps
    dense = run_tail(model, prefix, transcript.tail)
    yield Result(transcript.family, 0, "dense", right_tokens(dense, transcript), [], [])
    weights = {
        size: [page_weights(layer.q, layer.k, steps, size) for layer in dense.layers]
        for size in {rule.page_size for rule in rules.values()}
    }
    for budget, (name, rule) in itertools.product(budgets, rules.items()):
        restricted = run_tail(model, prefix, transcript.tail, visible_by(rule, budget, steps))
        # Weights are those of dense attention, so a rule is judged on the queries that the model wants answered.
        windows = [select(rule, budget, layer.q, layer.k, steps) for layer in dense.layers]
        pairs = list(zip(weights[rule.page_size], windows, strict=True))
        kept, top = [kept_weight(*pair) for pair in pairs], [top_page_kept(*pair) for pair in pairs]
        yield Result(transcript.family, budget, name, right_tokens(restricted, transcript), kept, top)


def records(results: Sequence[Result]) -> Iterator[tuple[str, float, dict[str, int | float | str]]]:
    """Metric, value and parameters of what is kept of a run: for each budget and rule, and there by family or layer."""
    for key in dict.fromkeys((result.budget, result.rule) for result in results):
        of_key = [result for result in results if (result.budget, result.rule) == key]
        params = {"budget": key[0], "rule": key[1]}
        for family in dict.fromkeys(result.family for result in of_key):
            right = torch.cat([result.right["first"] for result in of_key if result.family == family])
            yield "first", right.float().mean().item(), {**params, "family": family}
        yield "other", torch.cat([result.right["other"] for result in of_key]).float().mean().item(), params
        for number, layer in enumerate(zip(*(result.kept for result in of_key), strict=True)):
            kept = torch.cat([x.flatten() for x in layer])
            yield "weight_kept", kept.mean().item(), {**params, "layer": number}
            yield "weight_kept_p5", kept.quantile(0.05).item(), {**params, "layer": number}
        for number, layer in enumerate(zip(*(result.top for result in of_key), strict=True)):
            yield "top_page", sum(layer) / len(layer), {**params, "layer": number}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--context", type=int, default=8192, help="tokens")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024], help="tokens")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, metavar="RULE", help=", ".join(RULES))
    parser.add_argument("--seeds", type=int, default=1, help="transcripts per family")
    parser.add_argument("--out", type=Path, default=RESULTS / "selection.jsonl", help="file of the records")


def run(args: argparse.Namespace) -> None:
    model, rules = load_model(args.model), {name: RULES[name] for name in args.rules}
    results: list[Result] = []
    with tqdm(total=len(args.families) * args.seeds * (1 + len(rules) * len(args.budgets))) as bar:
        for family, seed in itertools.product(args.families, range(args.seeds)):
            for result in measure(model, draw_transcript(family, seed, args.context), rules, args.budgets):
                results.append(result)
                bar.set_postfix_str(f"{family} {seed}: {result.budget} {result.rule}")
                bar.update()
    writer = RecordWriter("selection", args.out, module="benchmarks.study")
    for metric, value, params in records(results):
        writer.write(metric, value, "share", {"context": args.context, **params})
    print(pivot(read_records(args.out), TABLE))
