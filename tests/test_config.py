"""Settings: what is accepted, how flags and keywords become a config, and what a request may ask for."""

from __future__ import annotations

import argparse
import pickle
import shlex
from dataclasses import asdict
from reprlib import repr as shorten

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_freekv.config import PAGE_SIZES, FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.config import flags as config_flags
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.memory.windows import WindowSizes
from sglang_freekv.request_params import request_budget_tokens, request_dump_interval, request_mass


def parse(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    return vars(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"budget_tokens": 2047}, "--freekv-budget"),
        ({"budget_tokens": 224}, "--freekv-budget"),
        ({"budget_tokens": 2048.0}, "--freekv-budget"),
        ({"budget_tokens": 2048, "max_budget_tokens": 1024}, "--freekv-max-budget"),
        ({"max_budget_tokens": 2049}, "--freekv-max-budget"),
        ({"sink_tokens": -32}, "--freekv-sink"),
        ({"sink_tokens": 33}, "--freekv-sink"),
        ({"recent_tokens": 0}, "--freekv-recent"),
        ({"recent_tokens": True}, "--freekv-recent"),
        ({"arena_tokens": 0}, "--freekv-arena"),
        ({"arena_tokens": 100}, "--freekv-arena"),
        ({"tau": 2.1}, "--freekv-tau"),
        ({"tau": -1.1}, "--freekv-tau"),
        ({"tau": float("nan")}, "--freekv-tau"),
        ({"host_memory_gib": 0}, "--freekv-host-memory"),
        ({"windows": 1.5}, "--freekv-windows"),
        ({"windows": 5}, "--freekv-windows"),
        ({"device_blocks_memory_gib": -1.0}, "--freekv-device-blocks-memory"),
        ({"dense_layers": (-1,)}, "--freekv-dense-layers"),
        ({"dense_layers": (1, 1)}, "--freekv-dense-layers"),
        ({"group_pooling": "median"}, "--freekv-group-pooling"),
        ({"selector": "clusters"}, "--freekv-selector"),
        ({"selector": "codes", "key_bits": 0}, "--freekv-key-bits"),
        ({"selector": "min-max", "key_bits": 2}, "--freekv-key-bits"),
        ({"selector": "mass", "key_bits": 0}, "--freekv-key-bits"),
        ({"hysteresis": -0.1}, "--freekv-hysteresis"),
        ({"selector": "one-time", "hysteresis": 0.5}, "--freekv-hysteresis"),
        ({"gate": 1.5}, "--freekv-gate"),
        ({"gate": 0.1, "tau": 0.5}, "--freekv-gate"),
        ({"gate": 0.1, "selector": "codes"}, "--freekv-gate"),
        ({"gate": 0.1, "key_bits": 0}, "--freekv-gate"),
        ({"mass": 1.1}, "--freekv-mass"),
        ({"mass": True}, "--freekv-mass"),
        ({"mass": 0.9, "selector": "codes"}, "--freekv-mass"),
        ({"candidates": 1}, "--freekv-candidates"),
        ({"candidates": 4, "selector": "codes"}, "--freekv-candidates"),
        ({"score_interval": 0}, "--freekv-score-interval"),
        ({"score_interval": 65}, "--freekv-score-interval"),
        ({"score_interval": 2, "tau": 0.9}, "--freekv-score-interval"),
        ({"score_interval": 2, "selector": "codes"}, "--freekv-score-interval"),
        ({"score_interval": 2, "mass": 0.9}, "--freekv-score-interval"),
        ({"score_interval": 2, "candidates": 4}, "--freekv-score-interval"),
        ({"group_pooling": "mean"}, "--freekv-group-pooling"),
        ({"key_bits": 3}, "--freekv-key-bits"),
        ({"key_bits": 2.0}, "--freekv-key-bits"),
        ({"key_bits": True}, "--freekv-key-bits"),
        ({"page_size": 8}, "--page-size"),
        ({"page_size": 16.0}, "--page-size"),
        ({"page_size": 64, "sink_tokens": 96}, "--freekv-sink"),
        ({"audit": 1}, "--freekv-audit"),
        ({"debug_dump": ""}, "--freekv-debug-dump"),
        ({"debug_dump": True}, "--freekv-debug-dump"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_flag(settings, flag):
    with pytest.raises(UnsupportedConfiguration, match=f"^{flag} is .*; give "):
        FreeKVConfig(**settings)


def test_recent_pages_alone_are_a_valid_budget():
    config = FreeKVConfig(budget_tokens=64, sink_tokens=0, recent_tokens=64)
    sizes = WindowSizes.of(config, config.page_size)
    assert (sizes.budget, sizes.sink, sizes.recent) == (2, 0, 2)


def test_the_window_is_as_wide_as_the_budget_where_no_maximum_is_given():
    assert FreeKVConfig(budget_tokens=4096).max_budget_tokens == 4096
    config = FreeKVConfig(budget_tokens=4096, max_budget_tokens=8192)
    assert WindowSizes.of(config, config.page_size).max_budget == 256


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_the_defaults_are_whole_pages_of_any_size(page_size):
    config = FreeKVConfig(page_size=page_size)
    sizes = WindowSizes.of(config, page_size)
    assert sizes.budget * page_size == 2048
    assert (sizes.sink, sizes.recent) == (128 // page_size, 128 // page_size)


@pytest.mark.parametrize("tau", [-1, -1.0, 0.9, 1.01, 2])
def test_every_tau_from_speculation_only_to_exact_is_accepted(tau):
    assert FreeKVConfig(tau=tau).tau == tau


def test_a_config_survives_pickling():
    config = FreeKVConfig(dense_layers=(0, 3), host_memory_gib=1.5)
    assert pickle.loads(pickle.dumps(config)) == config


SETTINGS = {  # flags, keywords, fields; the second have what excludes one of the first
    "by-codes": (
        "--kv-retrieval freekv --freekv-budget 1024 --freekv-max-budget 4096 --freekv-sink 64 "
        "--freekv-recent 96 --freekv-tau 0.5 --freekv-host-memory 2.5 --freekv-device-blocks-memory 0.5 "
        "--freekv-windows 3 --freekv-arena 4096 --freekv-dense-layers 0,1 --freekv-group-pooling mean "
        "--freekv-selector codes --freekv-key-bits 4 --freekv-hysteresis 0.25 --freekv-refetch --freekv-audit "
        "--freekv-debug-dump dumps",
        {
            "kv_retrieval": "freekv",
            "freekv_budget": 1024,
            "freekv_max_budget": 4096,
            "freekv_sink": 64,
            "freekv_recent": 96,
            "freekv_tau": 0.5,
            "freekv_host_memory": 2.5,
            "freekv_device_blocks_memory": 0.5,
            "freekv_windows": 3.0,
            "freekv_arena": 4096,
            "freekv_dense_layers": [0, 1],
            "freekv_group_pooling": "mean",
            "freekv_selector": "codes",
            "freekv_hysteresis": 0.25,
            "freekv_key_bits": 4,
            "freekv_refetch": True,
            "freekv_audit": True,
            "freekv_debug_dump": "dumps",
        },
        FreeKVConfig(
            budget_tokens=1024,
            max_budget_tokens=4096,
            sink_tokens=64,
            recent_tokens=96,
            tau=0.5,
            host_memory_gib=2.5,
            device_blocks_memory_gib=0.5,
            windows=3.0,
            arena_tokens=4096,
            dense_layers=(0, 1),
            group_pooling="mean",
            selector="codes",
            hysteresis=0.25,
            key_bits=4,
            refetch=True,
            audit=True,
            debug_dump="dumps",
        ),
    ),
    "by-mass": (
        "--kv-retrieval freekv --freekv-gate 0.05 --freekv-candidates 7 --freekv-mass 0.9",
        {"kv_retrieval": "freekv", "freekv_gate": 0.05, "freekv_candidates": 7, "freekv_mass": 0.9},
        FreeKVConfig(gate=0.05, candidates=7, mass=0.9),
    ),
    "scored-at-intervals": (
        "--kv-retrieval freekv --freekv-score-interval 4",
        {"kv_retrieval": "freekv", "freekv_score_interval": 4},
        FreeKVConfig(score_interval=4),
    ),
}


@pytest.mark.parametrize(("argv", "keywords", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_flags_and_keywords_give_the_same_config(argv, keywords, expected):
    assert take_options(parse(*shlex.split(argv))) == (expected, {})
    assert take_options(keywords) == (expected, {})


def test_every_setting_is_in_one_of_these():
    defaults, given = asdict(FreeKVConfig()), [asdict(expected) for _, _, expected in SETTINGS.values()]
    untested = {name for name in defaults if all(settings[name] == defaults[name] for settings in given)}
    assert untested == {"page_size"}


def test_options_of_sglang_are_handed_back_unchanged():
    rest = {"model_path": "m", "page_size": None}
    assert take_options({**rest, "kv_retrieval": "freekv"}) == (FreeKVConfig(), rest)
    small = rest | {"page_size": 16}
    assert take_options({**small, "kv_retrieval": "freekv"}) == (FreeKVConfig(page_size=16), small)
    assert take_options({**rest, "kv_retrieval": "none"}) == (None, rest)
    assert take_options(rest | parse()) == (None, rest)


@pytest.mark.parametrize("method", [None, "none"])
def test_an_option_without_the_method_is_refused_and_not_ignored(method):
    with pytest.raises(UnsupportedConfiguration, match="--freekv-sink has no effect without --kv-retrieval"):
        take_options({"kv_retrieval": method, "freekv_sink": 64})


def test_an_unknown_method_is_refused():
    with pytest.raises(UnsupportedConfiguration, match="quest"):
        take_options({"kv_retrieval": "quest"})


def test_every_flag_has_a_help_text_that_names_its_default():
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    flags = [action for action in parser._actions if action.dest != "help"]
    assert len(flags) == 1 + len(config_flags())
    assert all("(default: " in action.help for action in flags)


@pytest.mark.parametrize("custom_params", [None, {}, {"thinking_budget": 5}])
def test_a_request_that_asks_for_nothing_gets_the_budget(custom_params):
    assert request_budget_tokens(FreeKVConfig(max_budget_tokens=4096), custom_params) == 2048


@given(tokens=st.one_of(st.integers(-64, 5000), st.booleans(), st.floats(), st.text(max_size=3), st.none()))
def test_a_request_gets_what_it_asks_for_or_a_sentence(tokens):
    config = FreeKVConfig(max_budget_tokens=4096)
    fits = type(tokens) is int and tokens in range(256, 4097, 32)
    try:
        assert request_budget_tokens(config, {"freekv_budget": tokens}) == tokens
    except ValueError as error:
        assert not fits
        assert "multiple of 32" in str(error) and "4096" in str(error)
    else:
        assert fits


@pytest.mark.parametrize(("server", "mass"), [(None, 0.0), (0.0, 0.0), (0.9, 0.9)])
def test_a_request_that_asks_for_no_share_has_the_servers(server, mass):
    for custom_params in (None, {}, {"freekv_budget": 512}):
        assert request_mass(FreeKVConfig(mass=server), custom_params) == mass


@given(mass=st.one_of(st.floats(), st.floats(0, 1), st.integers(-1, 2), st.booleans(), st.text(max_size=3), st.none()))
def test_a_request_gets_the_share_that_it_asks_for_or_a_sentence(mass):
    fits = type(mass) in (int, float) and 0 <= mass <= 1
    try:
        assert request_mass(FreeKVConfig(mass=0.0), {"freekv_mass": mass}) == mass
    except ValueError as error:
        assert not fits
        assert shorten(mass) in str(error) and "a share from 0 to 1" in str(error)
    else:
        assert fits


def test_a_share_is_refused_where_all_budgets_are_fixed_and_zero_is_not():
    with pytest.raises(ValueError, match="--freekv-mass"):
        request_mass(FreeKVConfig(), {"freekv_mass": 0.9})
    assert request_mass(FreeKVConfig(), {"freekv_mass": 0}) == 0


@pytest.mark.parametrize(("settings", "selected"), [({}, 1), ({"mass": 0.9}, 4), ({"mass": 0.9, "candidates": 2}, 2)])
def test_a_row_may_be_longer_than_its_budget_only_where_rows_share_and_no_longer_than_lists(settings, selected):
    config = FreeKVConfig(max_budget_tokens=4096, **settings)
    sizes = WindowSizes.of(config, config.page_size)
    assert sizes.width == 8 + selected * 120
    assert sizes.longest(sizes.budget) == 8 + selected * 56


@pytest.mark.parametrize("custom_params", [5, [1], {"freekv_budgets": 512}])
def test_parameters_that_would_be_ignored_are_refused(custom_params):
    with pytest.raises(ValueError, match="custom_params"):
        request_budget_tokens(FreeKVConfig(), custom_params)


@pytest.mark.parametrize(
    ("asked", "interval"), [(None, None), ({}, None), ({"freekv_dump": False}, None), ({"freekv_dump": True}, 1)]
)
def test_a_request_is_dumped_where_it_asks_for_it(asked, interval):
    assert request_dump_interval(FreeKVConfig(debug_dump="dumps"), asked) == interval


@given(every=st.one_of(st.integers(-3, 100), st.floats(), st.text(max_size=3), st.none()))
def test_steps_between_dumps_are_counted_from_one(every):
    try:
        assert request_dump_interval(FreeKVConfig(debug_dump="dumps"), {"freekv_dump": every}) == every
    except ValueError as error:
        assert not (type(every) is int and every > 0)
        assert shorten(every) in str(error) and "a number of steps from 1" in str(error)
    else:
        assert every > 0


def test_a_dump_without_a_folder_is_refused_with_the_flag_to_add():
    with pytest.raises(ValueError, match="--freekv-debug-dump DIR"):
        request_dump_interval(FreeKVConfig(), {"freekv_dump": True})
