"""What the cost model knows of a language model: its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.shapes import ModelShape
from sglang_freekv.doctor.parameters import count_parameters
from sglang_freekv.memory.geometry import Geometry, stored_head_dim

MODELS = Path(__file__).parent / "models"  # config.json of each, as published, without what is not read here
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Model:
    """A dense decoder with gated MLPs (Llama, Mistral, Qwen2, Qwen3)."""

    name: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    params: int
    embedding_params: int  # of the input embedding, where it is not the output's too: a step reads only rows of it
    logits_params: int = 0  # of what multiplies the last hidden states
    max_context: int = 0  # tokens that it was trained for; 0: not said
    weight_bits: int = 16  # of a parameter; KV is bfloat16 in any case

    @classmethod
    def from_config(cls, config: dict, name: str, weight_bits: int = 16) -> Model:
        """Read a Hugging Face config.json.

        Raises
        ------
        ValueError
            If it lacks a field, or is not a dense model.
        """
        if experts := [key for key in _EXPERTS if config.get(key)]:
            raise ValueError(f"{name}: {experts[0]} is {config[experts[0]]}; the cost model knows dense models only")
        try:
            counts = count_parameters(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        q_heads = config["num_attention_heads"]
        return cls(
            name=name,
            layers=config["num_hidden_layers"],
            q_heads=q_heads,
            kv_heads=config.get("num_key_value_heads") or q_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // q_heads,
            params=counts.total,
            embedding_params=counts.input_embedding if counts.output_embedding else 0,
            logits_params=counts.output_embedding or counts.input_embedding,
            max_context=config.get("max_position_embeddings", 0),
            weight_bits=weight_bits,
        )

    @classmethod
    def load(cls, name: str, weight_bits: int = 16) -> Model:
        """A model of `MODELS` by its name, or the config.json at a path."""
        path = MODELS / f"{name}.json"
        path = path if path.exists() else Path(name)
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in MODELS.glob("*.json")))
            raise ValueError(f"no model {name!r}: give one of {known}, or the path of a config.json")
        label = path.parent.name if path.name == "config.json" else path.stem
        return cls.from_config(json.loads(path.read_text()), label, weight_bits)

    @classmethod
    def of_shape(cls, shape: ModelShape, name: str = "measured") -> Model:
        """A model that the GPU suite measures: `ModelShape` writes Llama checkpoints."""
        config = {
            "model_type": "llama",
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
        }
        return cls.from_config(config, name)

    @property
    def weight_bytes(self) -> int:
        """Of all parameters, in memory."""
        return self.params * self.weight_bits // 8

    @property
    def read_params(self) -> int:
        """Parameters that a decode step reads."""
        return self.params - self.embedding_params

    def geometry(self, page_size: int, key_bits: int, device: str = "cuda", tp: int = 1) -> Geometry:
        """The KV cache of one of `tp` tensor-parallel ranks.

        Raises
        ------
        ValueError
            If the query heads do not divide among the ranks.
        """
        if self.q_heads % tp:
            raise ValueError(f"{self.name} has {self.q_heads} query heads, which {tp} ranks cannot share")
        return Geometry(
            num_layers=self.layers,
            num_qo_heads=self.q_heads // tp,
            num_kv_heads=max(self.kv_heads // tp, 1),
            head_dim=stored_head_dim(self.head_dim, device),
            dtype=torch.bfloat16,
            page_size=page_size,
            key_bits=key_bits,
        )
