"""What documents say in code style exists, their links lead somewhere, and they stay short."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_freekv.config import flags
from tests.support.documents import ROOT, broken_links, documents, wrong_names

DOCUMENTS = {str(path.relative_to(ROOT)): path for path in documents()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_name_in_code_style_exists_in_the_code(name):
    path = DOCUMENTS[name]
    assert wrong_names(path.read_text(), path.parent) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(name):
    path = DOCUMENTS[name]
    assert broken_links(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "`no_such_name`",
        "`--freekv-nothing`",
        "`--no-such-flag`",
        "`sglang_freekv/nothing.py`",
        "`nothing.json`",
        "`sglang_freekv.config.Nothing`",
        "`FreeKVConfig.nothing`",
        "`sglang_freekv.nothing`",
        "`/no_such_endpoint`",
        "`make nothing`",
        "`python -m tools.nothing`",
        "\n    python -m tools.soak --no-such-flag 1\n",
        "\n    make nothing\n",
    ],
)
def test_a_planted_wrong_name_is_found(wrong):
    assert wrong_names(f"A sentence with {wrong} in it.") != []


@pytest.mark.parametrize(
    "right",
    [
        "`budget_tokens`",
        "`--freekv-budget 2048`",
        "`--mem-fraction-static`",
        "`sglang_freekv/config.py`",
        "`plan.py`",
        "`sglang_freekv.config.FreeKVConfig`",
        "`FreeKVConfig.selector_name`",
        "`/server_info`",
        "`make serve MODEL=<folder>`",
        "`python -m tools.soak --minutes 5`",
    ],
)
def test_a_right_name_is_not(right):
    assert wrong_names(f"A sentence with {right} in it.") == []


@pytest.mark.parametrize("link", ["nothing.md", "README.md#nothing", "#nothing"])
def test_a_planted_broken_link_is_found(link):
    assert broken_links(f"# A heading\n\n[text]({link})", ROOT) == [link]


def test_links_within_a_document_and_to_folders_are_followed():
    assert (
        broken_links("# A heading, with marks\n\n[a](#a-heading-with-marks) [b](docs) [c](docs/flags.md#flags)", ROOT)
        == []
    )


def test_the_readme_has_no_link_that_a_package_index_cannot_follow():
    links = broken_links((ROOT / "README.md").read_text(), Path("nowhere"))
    assert links == []


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("benchmarks/README.md", 150)])
def test_a_first_page_stays_short(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_every_flag_is_explained():
    text = (ROOT / "docs/flags.md").read_text()
    assert [f.metadata["flag"] for f in flags().values() if f"| `--freekv-{f.metadata['flag']}` |" not in text] == []


def test_the_flags_for_a_card_are_rows_of_the_doctors_table():
    """README shows few columns of it: card, CPU memory, model, length, plain SGLang, at most, flags."""
    document = (ROOT / "docs/which_flags.md").read_text()
    rows = {
        (card, cpu, model, length, plain, most, flags)
        for card, cpu, model, _, length, plain, _, most, _, flags in _rows(document, 10)
    }
    shown = set(_rows((ROOT / "README.md").read_text(), 7))
    shown = {row for row in shown if row[0].endswith("GiB")}
    assert shown and shown <= rows


def _rows(text: str, num_columns: int) -> list[tuple[str, ...]]:
    """Rows of the tables of so many columns."""
    rows = [
        tuple(cell.strip() for cell in line.strip("| ").split("|"))
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if len(row) == num_columns]
