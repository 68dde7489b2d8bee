"""Which of SGLang's releases have what this package relies on: hooks with their signatures, and every other seam.

    python -m tools.sglang_releases.compatibility                      # the installed release against the record
    python -m tools.sglang_releases.compatibility 0.5.18 ./sglang-0.5.23-*.whl   # others; pip downloads a version
    python -m tools.sglang_releases.compatibility --write 0.5.16 0.5.18   # and make record and table of these

Wheels are read, not installed, and none of SGLang's dependencies is needed. The record is what the installed release
looked like when it was tested; without other releases, ``--write`` renews that part of it only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.version import Version

from freekv_patches.registry import ALL_PATCHES
from tools.sglang_releases.release import Release, is_same
from tools.sglang_releases.seams import find_seams

RECORD = Path(__file__).with_name("compatibility.json")
TABLE = Path(__file__).with_name("compatibility.md")
HOOKS = {patch.target: patch.signature for patch in ALL_PATCHES}

Differences = dict[str, str | None]  # dotted path -> what is there instead; None: nothing


@dataclass
class Record:
    """What one release has, and in what others differ from it."""

    release: str
    seams: dict[str, dict[str, str]]  # dotted path -> {"use": how we use it, "found": what it is}
    others: dict[str, Differences] = field(default_factory=dict)

    @classmethod
    def of(cls, release: Release) -> Record:
        """Describe every seam that the release has; candidates that it lacks are our own methods."""
        described = {path: (use, release.describe(path)) for path, use in sorted(find_seams().items())}
        return cls(release.version, {p: {"use": use, "found": found} for p, (use, found) in described.items() if found})

    @classmethod
    def load(cls, path: Path = RECORD) -> Record:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path = RECORD) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def differences(self, release: Release) -> Differences:
        """Compare a release with the hooks' recorded signatures and with this record."""
        recorded = HOOKS | {path: seam["found"] for path, seam in self.seams.items()}
        found = {path: release.describe(path) for path in recorded}
        return {path: new for path, new in found.items() if new is None or not is_same(recorded[path], new)}


def table(record: Record) -> str:
    """Markdown: how much of what we rely on each release has, and what changed."""
    columns = {record.release: {}, **record.others}
    versions = sorted(columns, key=Version)
    differing = {path for found in record.others.values() for path in found}
    others = {path: seam["use"] for path, seam in record.seams.items() if path in differing}

    def row(*cells: object) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    def verdicts(path: str) -> list[str]:
        found = [columns[version].get(path, "ok") for version in versions]
        return ["gone" if one is None else "ok" if one == "ok" else "changed" for one in found]

    def fitting(paths: Iterable[str]) -> list[int]:
        return [sum(path not in columns[version] for path in paths) for version in versions]

    heads = [f"**{version}**" if version == record.release else version for version in versions]
    rule = row(*["---"] * (len(versions) + 1))
    lines = [
        "# SGLang releases",
        "",
        f"Made by `python -m tools.sglang_releases.compatibility --write "
        f"{' '.join(sorted(record.others, key=Version))}`. The package is tested on {record.release} and refuses to "
        f"start on any other. A hook counts as changed when its signature is not the recorded one, another seam when "
        f"it is no longer what it was.",
        "",
        row("fits", *heads),
        rule,
        row(f"hooks, of {len(HOOKS)}", *fitting(HOOKS)),
        row(f"other seams, of {len(record.seams)}", *fitting(record.seams)),
        "",
        row("hook", *heads),
        rule,
        *(row(f"`{_short(path)}`", *verdicts(path)) for path in HOOKS),
        "",
        "Other seams that differ anywhere:",
        "",
        row("seam", "use", *heads),
        row(*["---"] * (len(versions) + 2)),
        *(row(f"`{_short(path)}`", others[path], *verdicts(path)) for path in sorted(others)),
        "",
        "Hooks that changed, with the first release that has the signature:",
        "",
    ]
    for path in HOOKS:
        before = HOOKS[path]
        for version in versions:
            now = columns[version].get(path)
            if now is not None and not is_same(before, now):
                before = now
                lines.append(f"- {version}: `{_short(path)}{now}`")
    return "\n".join(lines) + "\n"


def _short(path: str) -> str:
    return path.removeprefix("sglang.srt.")


def open_release(given: str, folder: Path) -> Release:
    """Read a wheel; a version is downloaded to `folder` first."""
    if (wheel := Path(given)).is_file():
        return Release.from_wheel(wheel)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", str(folder), f"sglang=={given}"], capture_output=True, text=True)
    wheels = list(folder.glob(f"sglang-{given}-*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(
            f"error: {given} is neither a wheel nor a release that pip can download; give a file or a version, "
            f"as listed by `pip index versions sglang`. pip says: {done.stderr.strip()}"
        )
    return Release.from_wheel(wheels[0])


def main(argv: list[str] | None = None) -> int:
    """Check or write; return 1 where the installed release is not what is recorded."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sglang_releases.compatibility", description=__doc__.split("\n")[0]
    )
    parser.add_argument("releases", nargs="*", metavar="WHEEL_OR_VERSION")
    parser.add_argument("--write", action="store_true", help=f"renew {RECORD.name} and {TABLE.name} beside this file")
    options = parser.parse_args(argv)
    installed = Release.installed()
    record = Record.load()
    if options.write:
        record = Record(**asdict(Record.of(installed)) | {"others": record.others})
    drift = record.differences(installed)
    if options.releases:
        with tempfile.TemporaryDirectory() as folder:
            releases = [open_release(given, Path(folder)) for given in options.releases]
            record.others = {r.version: record.differences(r) for r in releases if r.version != record.release}
        print(table(record), end="")
    if options.write:
        record.save()
        TABLE.write_text(table(record), encoding="utf-8")
    print(f"sglang {installed.version}: {len(HOOKS)} hooks and {len(record.seams)} other seams, {len(drift)} differ")
    for path, there in drift.items():
        print(f"{path}: recorded for {record.release}, found {there or 'nothing'}", file=sys.stderr)
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
