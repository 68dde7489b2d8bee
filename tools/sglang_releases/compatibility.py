"""Which of SGLang's releases have what this package relies on: hooks with their signatures, and every other seam.

    python -m tools.sglang_releases.compatibility                      # the installed release against the record
    python -m tools.sglang_releases.compatibility 0.5.18 ./sglang-0.5.24-*.whl   # others; pip downloads a version
    python -m tools.sglang_releases.compatibility --write 0.5.16 0.5.18   # and make record and table of these

Wheels are read, not installed, and none of SGLang's dependencies is needed. The record is what the tested releases look
like; ``--write`` renews that part of it for the installed one, and for a tested one that is named.
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

from freekv_patches.patch import Attribute
from freekv_patches.registry import patches_for
from sglang_freekv.tested_release import TESTED_RELEASES, WRITTEN_FOR
from tools.sglang_releases.release import Release, is_same
from tools.sglang_releases.seams import find_seams

RECORD = Path(__file__).with_name("compatibility.json")
TABLE = Path(__file__).with_name("compatibility.md")

Differences = dict[str, str | None]  # dotted path -> what is there instead; None: nothing


def hooks_of(release: str) -> dict[str, str]:
    """Target -> what `Release.describe` says of it in a tested release."""
    return {
        patch.target: "name" if isinstance(patch, Attribute) else patch.signature_in(release)
        for patch in patches_for(release)
    }


@dataclass
class Record:
    """What the tested releases have, and in what others differ from the one that they are most like."""

    tested: dict[str, dict[str, dict[str, str]]]  # release -> path -> {"use": how we use it, "found": what it is}
    like: dict[str, str] = field(default_factory=dict)  # another release -> a tested one
    others: dict[str, Differences] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = RECORD) -> Record:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path = RECORD) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def add(self, release: Release) -> None:
        """Take a release in: a tested one as what it is, another as its differences."""
        if release.version in WRITTEN_FOR:
            self.tested[release.version] = seams_of(release)
            return
        found = {tested: self.differences(release, tested) for tested in self.tested}
        like = min(found, key=lambda tested: len(found[tested]))
        self.like[release.version], self.others[release.version] = like, found[like]

    def differences(self, release: Release, tested: str) -> Differences:
        """Compare a release with a tested one: with its hooks' signatures and with what is recorded of it."""
        recorded = hooks_of(tested) | {path: seam["found"] for path, seam in self.tested[tested].items()}
        found = {path: release.describe(path) for path in recorded}
        return {path: new for path, new in found.items() if new is None or not is_same(recorded[path], new)}


def seams_of(release: Release) -> dict[str, dict[str, str]]:
    """Describe every seam that the release has; candidates that it lacks are our own methods."""
    described = {path: (use, release.describe(path)) for path, use in sorted(find_seams(release.version).items())}
    return {path: {"use": use, "found": found} for path, (use, found) in described.items() if found}


class Table:
    """Markdown: what of all that we rely on each release has."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._versions = sorted({*record.tested, *record.others}, key=Version)
        self._like = {version: record.like.get(version, version) for version in self._versions}

    def __str__(self) -> str:
        hooks = list(dict.fromkeys(path for tested in self._record.tested for path in hooks_of(tested)))
        seams = sorted({path for tested in self._record.tested.values() for path in tested} - set(hooks))
        uses = {path: seam["use"] for tested in self._record.tested.values() for path, seam in tested.items()}
        heads = [f"**{version}**" if version in self._record.tested else version for version in self._versions]
        rule = _row(*["---"] * (len(self._versions) + 1))
        lines = [
            "# SGLang releases",
            "",
            f"Made by `python -m tools.sglang_releases.compatibility --write {' '.join(self._versions)}`. The package "
            f"is written for {' and '.join(self._record.tested)}, tested on {' and '.join(TESTED_RELEASES)}, and "
            f"refuses to start on any other. Each release is read beside the one of those that it is most like: a hook "
            f"counts as changed when its signature is not the one recorded for that, another seam when it is no longer "
            f"what it was there; - is what that release does without. A release fits by reading where nothing has "
            f"changed and nothing is gone.",
            "",
            _row("", *heads),
            rule,
            _row("verdict", *map(self._verdict, self._versions)),
            _row("read beside", *(self._like[version] for version in self._versions)),
            _row("hooks that fit", *(self._fitting(version, hooks) for version in self._versions)),
            _row("other seams that fit", *(self._fitting(version, seams) for version in self._versions)),
            "",
            _row("hook", *heads),
            rule,
            *(_row(f"`{_short(path)}`", *self._cells(path)) for path in hooks),
            "",
            "Other seams that differ anywhere:",
            "",
            _row("seam", "use", *heads),
            _row(*["---"] * (len(self._versions) + 2)),
            *(_row(f"`{_short(path)}`", uses[path], *self._cells(path)) for path in seams if self._differs(path)),
        ]
        return "\n".join(lines) + "\n"

    def _verdict(self, version: str) -> str:
        if version in self._record.tested:
            return "written for, refused" if version in set(WRITTEN_FOR) - set(TESTED_RELEASES) else "tested"
        return "refused" if self._record.others[version] else "fits by reading, refused"

    def _cell(self, path: str, version: str) -> str:
        like = self._like[version]
        if path not in hooks_of(like) and path not in self._record.tested[like]:
            return "-"
        found = self._record.others.get(version, {}).get(path, "ok")
        return "gone" if found is None else "ok" if found == "ok" else "changed"

    def _cells(self, path: str) -> list[str]:
        return [self._cell(path, version) for version in self._versions]

    def _differs(self, path: str) -> bool:
        return set(self._cells(path)) != {"ok"}

    def _fitting(self, version: str, paths: Iterable[str]) -> str:
        cells = [cell for path in paths if (cell := self._cell(path, version)) != "-"]
        return f"{cells.count('ok')} of {len(cells)}"


def table(record: Record) -> str:
    """The document."""
    return str(Table(record))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


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
    if installed.version not in WRITTEN_FOR:
        raise SystemExit(f"error: {installed.version} is installed; install one of {', '.join(WRITTEN_FOR)} for this")
    record = Record.load()
    if options.write:
        record.add(installed)
    drift = record.differences(installed, installed.version)
    if options.releases:
        with tempfile.TemporaryDirectory() as folder:
            releases = [open_release(given, Path(folder)) for given in options.releases]
            for release in sorted(releases, key=lambda release: release.version not in WRITTEN_FOR):
                if release.version != installed.version:
                    record.add(release)
        print(table(record), end="")
    if options.write:
        record.save()
        TABLE.write_text(table(record), encoding="utf-8")
    hooks, seams = hooks_of(installed.version), record.tested[installed.version]
    print(f"sglang {installed.version}: {len(hooks)} hooks and {len(seams)} other seams, {len(drift)} differ")
    for path, there in drift.items():
        print(f"{path}: recorded for {installed.version}, found {there or 'nothing'}", file=sys.stderr)
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
