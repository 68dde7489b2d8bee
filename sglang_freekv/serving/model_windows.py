"""Which layers of a model have a sliding window, and how many tokens they see: from its configuration alone.

The memory is planned, and the doctor asks, before there are layers to ask. A configuration does not say what a class of
SGLang makes of it, so each class that was read has its rule here, and `layer_check` holds loaded layers against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from transformers import PretrainedConfig

# What a query sees of a layer, its own token included; None: all.
Windows = tuple[int | None, ...]


def _every_other(text: PretrainedConfig) -> Windows:
    return tuple(None if i % 2 else text.sliding_window for i in range(text.num_hidden_layers))


def _by_type(text: PretrainedConfig, also_seen: int = 0) -> Windows:
    return tuple(text.sliding_window + also_seen if t == "sliding_attention" else None for t in text.layer_types)


def _by_pattern(text: PretrainedConfig) -> Windows:
    pattern = getattr(text, "sliding_window_pattern", None)
    period = len(pattern) if pattern else 1  # SGLang takes the pattern's length: "LLLG"
    return tuple(text.sliding_window if (i + 1) % period else None for i in range(text.num_hidden_layers))


def _none(text: PretrainedConfig) -> Windows:
    return (None,) * text.num_hidden_layers


# By the class in config.json, as in SGLang 0.5.17.
_RULES: dict[str, Callable[[PretrainedConfig], Windows]] = {
    "Gemma2ForCausalLM": _every_other,
    "Gemma3ForCausalLM": _by_type,
    "GptOssForCausalLM": _by_type,
    # SGLang hands the window on as the tokens before the query, and so shows a token more than the model was made for.
    "Cohere2ForCausalLM": lambda text: _by_type(text, also_seen=1),
    "Exaone4ForCausalLM": _by_pattern,
    # SGLang serves these without the window that a configuration may have.
    "MistralForCausalLM": _none,
}


def sliding_windows(model: ModelConfig) -> Windows | None:
    """Tokens that a query sees in each layer, its own included, or None: all.

    Returns
    -------
    tuple, ``[num_layers]``; empty where every layer sees all; None where nobody has read what the model's class does
    with the window that its configuration has. A window as long as the context is none.
    """
    if not _has_window(model):
        return ()
    rule = next((_RULES[name] for name in model.hf_config.architectures if name in _RULES), None)
    if rule is None:
        return None
    windows = tuple(None if n is None or n >= model.context_len else n for n in rule(model.hf_text_config))
    return windows if any(windows) else ()


def _has_window(model: ModelConfig) -> bool:
    """Whether the configuration has layers whose attention ends before the context does."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    text = model.hf_text_config
    # SGLang's pool for such models is off: it says so of the model, and not of its layers.
    if is_hybrid_swa_model(model.hf_config.architectures, text) or model.is_local_attention_model:
        return True
    window = model.sliding_window_size
    if not window or window >= model.context_len or getattr(text, "use_sliding_window", True) is False:
        return False
    layer_types = getattr(text, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types
