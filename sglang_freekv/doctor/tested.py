"""Which classes of models were run with KV retrieval."""

from __future__ import annotations

# By device, as benchmarks/results/models.jsonl records them: `python -m benchmarks.models`.
TESTED_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "cpu": (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ),
    "cuda": (),
}


def was_run(architecture: str, device: str | None = None) -> bool:
    """Whether a model of this class was run with KV retrieval, on one kind of device or on any."""
    devices = TESTED_ARCHITECTURES if device is None else (device,)
    return any(architecture in TESTED_ARCHITECTURES[name] for name in devices)
