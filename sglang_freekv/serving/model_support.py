"""Which models FreeKV serves: what of their configuration stands in the way, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.serving.model_windows import sliding_windows

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig


def check_model(model: ModelConfig, config: FreeKVConfig) -> None:
    """Raise UnsupportedConfiguration where the model is not served."""
    if (obstacle := _obstacle(model)) is not None:
        raise UnsupportedConfiguration(
            f"--kv-retrieval freekv serves models with full attention or sliding windows in every layer; "
            f"{model.model_path} has {obstacle}. Remove --kv-retrieval to serve it."
        )
    num_layers = model.num_hidden_layers
    if any(layer >= num_layers for layer in config.dense_layers):
        raise UnsupportedConfiguration(
            f"--freekv-dense-layers is {config.dense_layers}; the model has layers 0 to {num_layers - 1}."
        )
    windows = sliding_windows(model)
    if sliding := [layer for layer in config.dense_layers if windows and windows[layer] is not None]:
        raise UnsupportedConfiguration(
            f"--freekv-dense-layers is {config.dense_layers}, and the model's layers {sliding} have a sliding window, "
            f"beyond which there is nothing to attend to; leave them out."
        )


def _obstacle(model: ModelConfig) -> str | None:
    """Name the part of the model that FreeKV cannot serve; None where there is none."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    if model.attention_arch == AttentionArch.MLA:
        return "multi-head latent attention (MLA), which has no keys per head"
    if mambaish_config(model) is not None:
        return "state-space or linear-attention layers"
    # SGLang's own list has the encoder-decoders that it has classes for.
    if model.is_encoder_decoder or getattr(model.hf_config, "is_encoder_decoder", False):
        return "cross-attention layers"
    if _sees_later_tokens(model):
        return "attention to later tokens, as encoders have"
    if sliding_windows(model) is None:
        return "sliding-window layers, and FreeKV does not know which of them a model of its class has"
    if model.v_head_dim != model.head_dim:
        return f"values of another width ({model.v_head_dim}) than keys ({model.head_dim})"
    return None


def _sees_later_tokens(model: ModelConfig) -> bool:
    """Whether attention is not causal. SGLang knows its own encoders of texts, not those that classify or rank."""
    text = model.hf_text_config
    return (
        model.embedding_model_spec.bidirectional_attention
        or getattr(text, "type_vocab_size", None) is not None  # of BERT and its kin: one text or the other of a pair
        or getattr(text, "is_causal", True) is False
        or bool(getattr(text, "use_bidirectional_attention", False))
    )
