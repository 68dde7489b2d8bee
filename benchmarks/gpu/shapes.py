"""The models whose sizes the suite measures: a configuration and a tokenizer, no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_freekv.memory.geometry import Geometry


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama model in bfloat16."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int  # tokens, with room for the steps that are measured at the longest context

    def geometry(self, layers: int | None = None) -> Geometry:
        """The KV cache of this model, or of fewer of its layers."""
        import torch  # only here: command lines offer the shapes before anything large is imported

        from sglang_freekv.config import FreeKVConfig
        from sglang_freekv.memory.geometry import Geometry

        return Geometry(
            num_layers=layers or self.layers,
            num_qo_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=torch.bfloat16,
            key_bits=FreeKVConfig().key_bits,
        )

    def write(self, folder: Path) -> Path:
        """Write a checkpoint folder for ``--load-format dummy``, and return it."""
        from sglang_freekv.testing.tiny_model import TinyModel, build_tokenizer

        model = TinyModel(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab=self.vocab,
            max_position=self.max_position,
        )
        config = model.hf_config() | {"intermediate_size": self.intermediate, "rope_theta": 500000.0}
        tokenizer, tokenizer_config = build_tokenizer(self.vocab, self.max_position)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (folder / "config.json").write_text(json.dumps(config))
        return folder


SHAPES = {
    "llama-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 135168),
    "rehearsal": ModelShape(2, 128, 4, 2, 64, 256, 512, 4096),
}
