"""What operators get: the dashboard and the rules can be read, and speak of metrics that exist."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

import sglang_freekv.operations.__main__ as command
from sglang_freekv.memory.units import in_words
from sglang_freekv.operations import dashboard
from sglang_freekv.operations.__main__ import FOLDER, generated
from sglang_freekv.serving.metrics_catalog import METRICS, PREFIX, published_name

PUBLISHED = {published_name(name) for name in METRICS}
RULES = yaml.safe_load((FOLDER / "alert_rules.yml").read_text())["groups"][0]["rules"]
BOARD = json.loads((FOLDER / "grafana_dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def all_queries() -> list[str]:
    """PromQL of all panels and rules, with an interval in place of Grafana's variable."""
    of_panels = [target["expr"].replace("$__rate_interval", "5m") for p in PANELS for target in p["targets"]]
    return of_panels + [rule["expr"] for rule in RULES]


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"sglang:\w+", query))


@pytest.mark.parametrize("path", list(generated()), ids=lambda path: path.name)
def test_a_generated_file_is_up_to_date(path: Path):
    assert path.read_text() == generated()[path], "run python -m sglang_freekv.operations --write"


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is out of date, in place of the package's."""
    path = tmp_path / "board.json"
    path.write_text("old")
    monkeypatch.setattr(command, "generated", lambda: {path: "new"})
    return path


def test_help_writes_nothing(stale: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "--write" in capsys.readouterr().out
    assert stale.read_text() == "old"


def test_files_are_written_when_it_is_asked_for_only(stale: Path, capsys: pytest.CaptureFixture):
    assert command.main([]) == 1
    assert f"{stale}: out of date, see --write" in capsys.readouterr().out
    assert stale.read_text() == "old"
    assert command.main(["--write"]) == 0
    assert stale.read_text() == "new"
    assert command.main([]) == 0


def test_every_metric_of_ours_that_is_asked_for_exists_and_each_is_shown():
    asked = {name for query in all_queries() for name in metrics_of(query) if name.startswith(PREFIX)}
    assert asked == PUBLISHED


@pytest.mark.parametrize("query", all_queries())
def test_every_query_is_promql(query: str):
    promql_parser = pytest.importorskip("promql_parser", reason="the extra `test` brings it")
    promql_parser.parse(query)


def test_the_rules_are_about_what_an_operator_must_know():
    assert {rule["alert"] for rule in RULES} >= {"FreeKVHostStoreFull", "FreeKVAbsentPages", "FreeKVCorrectionStorm"}
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))


def is_firing(alert: str, rates: dict[str, float]) -> bool:
    """Whether a rule holds for these rates per second, by the names of METRICS."""
    (rule,) = (rule for rule in RULES if rule["alert"] == alert)
    named = {published_name(name): str(value) for name, value in rates.items()}
    return eval(re.sub(r"rate\((\S+?)\[10m\]\)", lambda found: named[found[1]], rule["expr"]))


@pytest.mark.parametrize(
    ("flagged", "missed", "fires"),
    [
        (0.78, 0.11, False),  # a language model whose requests have two windows of blocks each
        (1.0, 0.05, False),  # a model whose queries never stay, with everything near
        (0.1, 0.9, False),  # hidden beside the step
        (0.78, 0.5, True),
        (1.0, 0.3, True),
    ],
)
def test_a_storm_of_corrections_is_one_that_attention_waits_for(flagged: float, missed: float, fires: bool):
    rates = {"rows": 900.0, "flagged_rows": 900 * flagged, "hits": 50 * (1 - missed), "misses": 50 * missed}
    assert is_firing("FreeKVCorrectionStorm", rates) is fires


def test_the_dashboard_can_be_imported_anywhere():
    """No data source of ours is in it, numbers are unique, and panels do not overlap."""
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    sources = [holder["datasource"]["uid"] for panel in PANELS for holder in (panel, *panel["targets"])]
    assert set(sources) == {"${datasource}"} == {variables["instance"]["datasource"]["uid"]}
    taken = [
        (x, y)
        for grid in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_every_panel_can_be_narrowed_to_one_server_and_says_what_its_metrics_ask_for():
    for panel in PANELS:
        for target in panel["targets"]:
            selected = re.findall(r"sglang:\w+(.{0,24})", target["expr"])
            assert all(rest.startswith('{instance=~"$instance"}') for rest in selected), target["expr"]
        if PREFIX in str(panel["targets"]):
            assert panel["description"]


def test_the_rows_of_the_dashboard_are_those_of_the_code():
    assert [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"] == list(dashboard.ROWS)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (5_368_709, "5.12 MiB"),
        (10 * 2**20 - 1, "10.0 MiB"),
        (100 * 2**30 - 1, "100 GiB"),
        (3 * 2**50, "3072 TiB"),
    ],
)
def test_a_size_has_three_digits_and_the_unit_that_fits(num_bytes: int, text: str):
    assert in_words(num_bytes) == text


def test_no_size_is_off_by_more_than_its_last_digit():
    for exponent in range(120):
        num_bytes = int(1.3**exponent)
        number, unit = in_words(num_bytes).split()
        factor = 1024 ** ("bytes", "KiB", "MiB", "GiB", "TiB").index(unit)
        assert math.isclose(float(number) * factor, num_bytes, rel_tol=0.006)
