"""Write the dashboard, and the table of metrics in README.md, anew: ``python -m sglang_freekv.operations --write``.

Without ``--write``, say which of them are out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
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


def main(argv: list[str] | None = None) -> int:
    """Write, or compare; return 1 where a file is left out of date."""
    parser = argparse.ArgumentParser(prog="python -m sglang_freekv.operations", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files that are out of date")
    is_writing = parser.parse_args(argv).write
    stale = {path: text for path, text in generated().items() if path.read_text() != text}
    for path, text in stale.items():
        if is_writing:
            path.write_text(text)
        print(f"{path}: {'written' if is_writing else 'out of date, see --write'}")
    if not stale:
        print("The dashboard and the table of metrics are up to date.")
    return 1 if stale and not is_writing else 0


if __name__ == "__main__":
    sys.exit(main())
