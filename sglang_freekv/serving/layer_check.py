"""Which attention the layers of a loaded model ask for. A configuration does not tell everything; its layers do.

SGLang says what a layer wants in the fields of `RadixAttention`, and every backend reads those that it knows. Here
every field is known: it is read, it has no effect, or it must have the value with which attention is
softmax(scaling * q k) v over all earlier tokens, or over those in the layer's window, with a soft cap and sinks or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.releases import release

ALLOWED: dict[str, tuple[Any, ...]] = {
    "attn_type": (AttentionType("decoder"),),
    "is_cross_attention": (False,),
    "use_irope": (False,),
    "pos_encoding_mode": ("NONE",),
    "logit_capping_method": ("tanh",),
    "xai_temperature_len": (-1, None),
    # Scales of queries in 8 bits, and of an indexer.
    "q_scale_float": (None,),
    "idx_q_scale_float": (None,),
    "idx_k_scale_float": (None,),
    "idx_v_scale_float": (None,),
}
READ = {
    *("layer_id", "scaling", "head_dim", "qk_head_dim", "v_head_dim"),
    *("tp_q_head_num", "tp_k_head_num", "tp_v_head_num"),
    *("sliding_window_size", "logit_cap"),  # held against what the memory was planned for
}
# The scales of a quantized KV cache, which `support` refuses.
WITHOUT_EFFECT = {
    *("quant_method", "k_scale", "v_scale", "k_scale_float", "v_scale_float"),
    *release.PREFILL_GRAPH_FIELDS,
}

# And a mark that Transformers leaves on the modules of models that are its own, as Gemma 3 is.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {"_is_hf_initialized"}


def fields_of(layer: RadixAttention) -> dict[str, Any]:
    """What the layer was given, by name: attributes, parameters, buffers and modules."""
    own = {name: value for name, value in vars(layer).items() if name not in _OF_EVERY_MODULE}
    return {**own, **layer._parameters, **layer._buffers, **layer._modules}


def check_layer(layer: RadixAttention, geometry: Geometry, first_layer: int, context_len: int | None = None) -> None:
    """Raise UnsupportedConfiguration where a layer asks for attention that FreeKV does not compute.

    Parameters
    ----------
    geometry : Geometry
        What the KV cache is made for.
    first_layer : int
        SGLang's number of the first layer of this rank.
    context_len : int, optional
        Tokens of the longest request; a window as long as that is none.
    """
    asked = [
        f"{name}={_shown(value)}"
        for name, value in fields_of(layer).items()
        if name not in READ | WITHOUT_EFFECT and not _is_one_of(value, ALLOWED.get(name, (None,)))
    ]
    asked += _other_shapes(layer, geometry)
    asked += _other_logits(layer, geometry, layer.layer_id - first_layer, context_len)
    if not 0 <= layer.layer_id - first_layer < geometry.num_layers:
        asked.append(f"a number beyond the {geometry.num_layers} layers of the KV cache")
    refuse(layer, asked)


def check_layers(
    layers: Iterable[RadixAttention], geometry: Geometry, first_layer: int, context_len: int | None = None
) -> set[RadixAttention]:
    """Check the layers of a model, which are returned; two of one number would share their windows."""
    layers = set(layers)
    number, times = max(Counter(layer.layer_id for layer in layers).items(), key=lambda item: item[1], default=(0, 0))
    for layer in sorted(layers, key=lambda layer: layer.layer_id):
        check_layer(layer, geometry, first_layer, context_len)
        if times > 1 and layer.layer_id == number:
            refuse(layer, [f"{times} modules of this number"])
    return layers


def refuse(layer: RadixAttention, asked: list[str]) -> None:
    """Raise UnsupportedConfiguration where anything is asked."""
    if asked:
        raise UnsupportedConfiguration(
            f"FreeKV: layer {layer.layer_id} asks for attention with {', '.join(asked)}, which is not supported; "
            f"remove --kv-retrieval to serve this model"
        )


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return not isinstance(value, torch.Tensor) and value in allowed


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _other_logits(layer: RadixAttention, geometry: Geometry, number: int, context_len: int | None) -> list[str]:
    """What of its window and its cap is not as the configuration was read."""
    planned = geometry.sliding_windows[number : number + 1] or (None,)
    # SGLang counts the tokens before the query; -1: no window.
    window = -1 if planned[0] is None else planned[0] - 1
    size = -1 if layer.sliding_window_size is None else layer.sliding_window_size
    if planned[0] is None and context_len is not None and size + 1 >= context_len:
        size = -1
    expected = {"sliding_window_size": window, "logit_cap": geometry.logit_cap}
    found = {"sliding_window_size": size, "logit_cap": layer.logit_cap or 0.0}
    return [f"{name}={found[name]} instead of {expected[name]}" for name in found if found[name] != expected[name]]


def _other_shapes(layer: RadixAttention, geometry: Geometry) -> list[str]:
    """What of its heads is not as in the KV cache, which has one shape for all layers."""
    expected = {
        "tp_q_head_num": geometry.num_qo_heads,
        "tp_k_head_num": geometry.num_kv_heads,
        "tp_v_head_num": geometry.num_kv_heads,
        "v_head_dim": layer.qk_head_dim,
    }
    found = {name: getattr(layer, name) for name in expected}
    other = [f"{name}={value} instead of {expected[name]}" for name, value in found.items() if value != expected[name]]
    if layer.qk_head_dim > geometry.head_dim:
        other.append(f"qk_head_dim={layer.qk_head_dim}, more than {geometry.head_dim}")
    return other
