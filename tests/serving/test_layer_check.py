"""A model is refused, when it is loaded, for every field of a layer by which attention would be another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.serving.layer_check import ALLOWED, READ, WITHOUT_EFFECT, check_layers, fields_of

GEOMETRY = Geometry(num_layers=3, num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)
FIRST = 5  # number of the first of three layers

OTHER = {
    "attn_type": AttentionType.ENCODER_ONLY,
    "is_cross_attention": True,
    "use_irope": True,
    "logit_capping_method": "other",
    "pos_encoding_mode": "ALIBI",
    "xai_temperature_len": 1024,
    "q_scale_float": 0.5,
    "idx_q_scale_float": 0.5,
    "idx_k_scale_float": 0.5,
    "idx_v_scale_float": 0.5,
}
OTHER_LOGITS = {"logit_cap": 30.0, "sliding_window_size": 4095}  # than the memory was planned for
OTHER_SHAPES = {
    "tp_q_head_num": 8,
    "tp_k_head_num": 1,
    "tp_v_head_num": 1,
    "v_head_dim": 32,
    "qk_head_dim": 128,
}


def layer(number: int = FIRST, **changes: object) -> RadixAttention:
    made = RadixAttention(4, 64, scaling=0.125, num_kv_heads=2, layer_id=number)
    vars(made).update(changes)
    return made


def assert_refused(asked: str, *layers: RadixAttention) -> None:
    with pytest.raises(UnsupportedConfiguration, match=f"layer .* asks for attention with .*{asked}.*--kv-retrieval"):
        check_layers(layers, GEOMETRY, FIRST)


def test_every_field_of_a_layer_is_read_or_has_no_effect_or_must_have_its_default():
    fields = fields_of(layer())
    assert set(fields) == set(ALLOWED) | READ | WITHOUT_EFFECT
    assert all(fields[name] in allowed for name, allowed in ALLOWED.items())


def test_the_layers_of_a_decoder_pass_and_are_returned():
    layers = [layer(FIRST + i) for i in range(3)]
    assert check_layers(layers, GEOMETRY, FIRST) == set(layers)
    narrow = layer(head_dim=48, qk_head_dim=48, v_head_dim=48)  # is stored padded
    scaled = layer(k_scale=0.5, k_scale_float=0.5, quant_method=object())  # of a KV cache in 8 bits, which this is not
    assert check_layers([narrow], GEOMETRY, FIRST) and check_layers([scaled], GEOMETRY, FIRST)


def test_each_allowed_field_has_a_case_here():
    assert set(OTHER) == set(ALLOWED)


@pytest.mark.parametrize(("name", "value"), (OTHER | OTHER_LOGITS).items())
def test_a_field_with_another_value_is_refused_by_name(name: str, value: object):
    assert_refused(f"{name}={value}", layer(FIRST + 1), layer(**{name: value}))


def test_windows_and_caps_are_those_that_the_memory_was_planned_for():
    geometry = replace(GEOMETRY, sliding_windows=(128, None, 64), logit_cap=50.0)
    layers = [layer(FIRST + i, logit_cap=50.0, sliding_window_size=size) for i, size in enumerate((127, -1, 63))]
    assert check_layers(layers, geometry, FIRST) == set(layers)
    for size in (-1, 128, 63):
        with pytest.raises(UnsupportedConfiguration, match=f"sliding_window_size={size} instead of 127"):
            check_layers([layer(logit_cap=50.0, sliding_window_size=size)], geometry, FIRST)
    with pytest.raises(UnsupportedConfiguration, match=r"logit_cap=0.0 instead of 50.0"):
        check_layers([layer(FIRST + 1)], geometry, FIRST)


def test_a_window_as_long_as_the_context_is_none_and_one_of_a_token_is_one():
    whole = layer(sliding_window_size=4095)
    assert check_layers([whole], GEOMETRY, FIRST, context_len=4096) == {whole}
    with pytest.raises(UnsupportedConfiguration, match="sliding_window_size=4095 instead of -1"):
        check_layers([whole], GEOMETRY, FIRST, context_len=8192)
    own = layer(sliding_window_size=0)
    assert check_layers([own], replace(GEOMETRY, sliding_windows=(1,)), FIRST) == {own}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_a_layer_whose_heads_are_not_those_of_the_cache_is_refused(name: str):
    assert_refused(f"{name}={OTHER_SHAPES[name]}", layer(**{name: OTHER_SHAPES[name]}))


def test_a_field_that_nobody_here_knows_is_refused_unless_it_is_none():
    assert check_layers([layer(sinks=None)], GEOMETRY, FIRST)
    assert_refused("window_of_tomorrow=7", layer(window_of_tomorrow=7))
    with_sinks = layer()
    with_sinks.sinks = torch.nn.Parameter(torch.zeros(4))
    assert_refused(r"sinks=a tensor \(4,\)", with_sinks)


@pytest.mark.parametrize("number", [FIRST - 1, FIRST + 3])
def test_a_layer_that_has_no_place_in_the_cache_is_refused(number: int):
    assert_refused("a number beyond the 3 layers", layer(number))


def test_two_layers_of_one_number_are_refused():
    assert_refused("2 modules of this number", layer(FIRST + 1), layer(), layer())
