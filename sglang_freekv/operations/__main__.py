"""Write the dashboard, and the table of metrics in README.md, anew: ``python -m sglang_freekv.operations``."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_freekv.operations import dashboard
from sglang_freekv.serving import metrics_catalog

FOLDER = Path(__file__).parent
_START, _END = "<!-- metrics -->", "<!-- end -->"


def generated() -> dict[Path, str]:
    """File -> what it must contain."""
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(_START)
    _, after = rest.split(_END)
    return {
        FOLDER / "grafana_dashboard.json": json.dumps(dashboard.build(), indent=2) + "\n",
        readme: f"{before}{_START}\n{metrics_catalog.markdown_table()}\n{_END}{after}",
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
        print(path)
