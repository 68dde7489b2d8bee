"""Write a small checkpoint of a model with sliding windows, soft caps or sinks, with random weights: no download.

    python -m sglang_freekv.testing.tiny_sliding_model --arch gemma3_text --out models/tiny

As `tiny_model`, but the parameters are those of Transformers' class, and of the scales only these are chosen: scores
are so wide that a few dozen keys carry most of the attention, and what layers add outweighs the embedding, so that the
next token depends on the context.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import torch

from sglang_freekv.testing.tiny_model import build_tokenizer, sizes_in_config, special_id, write_checkpoint

_SCORE_STD = 2.75  # of q.k / sqrt(head_dim) over the keys
_LAYER_STD = 2.0  # of what a layer adds, of an embedding's 1
_CAP = 5.0  # of attention's logits in Gemma 2; its own, 50, would not show at such scores
_SINK_STD = 2.0

_ARCHITECTURES = {
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class TinySlidingModel:
    """Everything that determines a checkpoint; equal values give equal bytes, with one release of Transformers."""

    arch: Literal["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "exaone4"] = "gemma3_text"
    layers: int = 4
    hidden: int = 256
    heads: int = 4  # query heads
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 512  # 256 bytes, the special tokens, and padding
    window: int = 100  # tokens, as the model's own code counts them
    max_position: int = 131072  # tokens
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in _ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(_ARCHITECTURES)}, got {self.arch!r}")

    def write(self, out: Path) -> None:
        """Write config.json, model.safetensors and the tokenizer files into the folder `out`."""
        tokenizer = build_tokenizer(self.vocab, self.max_position)
        write_checkpoint(out, self.weights(), self.hf_config(), tokenizer, {"eos_token_id": special_id("<|end|>")})

    def hf_config(self) -> dict[str, Any]:
        """The model's config.json."""
        special = {"pad_token_id": special_id("<|pad|>"), "bos_token_id": None, "eos_token_id": special_id("<|end|>")}
        # The layers of a period slide, but for the last one; Mistral's all slide.
        pattern = {"gemma2": 2, "gpt_oss": 2}.get(self.arch, 3)
        slides = [self.arch == "mistral" or (i + 1) % pattern != 0 for i in range(self.layers)]
        common = {
            **sizes_in_config(self, _ARCHITECTURES[self.arch]),
            "sliding_window": self.window,
            "layer_types": ["sliding_attention" if x else "full_attention" for x in slides],
            "torch_dtype": self.dtype,
        }
        return common | special | self._own_config(pattern)

    def _own_config(self, pattern: int) -> dict[str, Any]:
        """What only this architecture has."""
        theta = {"rope_theta": 1e6, "rope_type": "default"}
        if self.arch == "gemma2":
            # Of the last logits SGLang's cap is a GPU's kernel, and changes no greedy token.
            caps = {"attn_logit_softcapping": _CAP, "final_logit_softcapping": None}
            act = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
            return {"query_pre_attn_scalar": self.head_dim, "rope_theta": 1e6, **caps, **act}
        if self.arch == "gemma3_text":
            thetas = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": pattern}
            return {"query_pre_attn_scalar": self.head_dim, "tie_word_embeddings": False, **thetas}
        if self.arch == "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0}
            return {"tie_word_embeddings": False, "rope_parameters": theta, **experts}
        if self.arch == "cohere2":
            return {"logit_scale": 4.0, "rope_theta": 1e6, "use_qk_norm": False}
        if self.arch == "exaone4":
            letters = "L" * (pattern - 1) + "G"
            return {"sliding_window_pattern": letters, "rope_theta": 1e6, "hidden_act": "silu"}
        return {"rope_theta": 1e6}

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters under their Hugging Face names, in `dtype`, on the CPU."""
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = self.hf_config()
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        return {
            name: self._draw(name, parameter, generator).to(getattr(torch, self.dtype)).contiguous()
            for name, parameter in model.state_dict().items()
            if name not in tied
        }

    def _draw(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.randn(parameter.shape, generator=generator)
        part, qk_std = name.split(".")[-2], math.sqrt(_SCORE_STD)
        if name.endswith("sinks"):
            return drawn * _SINK_STD
        if part in ("q_norm", "k_norm"):
            return torch.full_like(parameter, qk_std - 1 if self.arch.startswith("gemma") else qk_std)
        if "norm" in part:
            follows = part.startswith("post") and self.arch in ("gemma2", "gemma3_text", "exaone4")
            scale = _LAYER_STD if follows else 1.0
            scale *= 2 if follows and self.arch == "gemma2" else 1  # its embedding is its head: the token would repeat
            return torch.full_like(parameter, scale - 1 if self.arch.startswith("gemma") else scale)
        if part == "embed_tokens":
            # Gemma multiplies; Cohere's embedding is its head, too.
            return drawn / math.sqrt(self.hidden) if self.arch in ("gemma2", "gemma3_text", "cohere2") else drawn
        if name.endswith("bias"):
            return drawn * 0.3
        fan_in = parameter.shape[-2] if "experts" in name else parameter.shape[-1]
        gain = {"q_proj": qk_std, "k_proj": qk_std, "o_proj": 3 * _LAYER_STD, "lm_head": 4.0}.get(part, 1.0)
        gain = _LAYER_STD if part == "down_proj" else gain
        return drawn * gain / math.sqrt(fan_in)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, made if missing")
    for field in dataclasses.fields(TinySlidingModel):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        parser.add_argument(flag, type=type(default), default=default, help=f"default {default}")
    values = vars(parser.parse_args())
    TinySlidingModel(**{name: value for name, value in values.items() if name != "out"}).write(values["out"])


if __name__ == "__main__":
    main()
