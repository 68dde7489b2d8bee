"""Studies of the trained model without a server.

python -m benchmarks.study selection     which rule selects the pages that attention needs
python -m benchmarks.study drift         how far queries and windows move from step to step
"""

from __future__ import annotations

import argparse

from benchmarks.study import drift, selection

_STUDIES = {"selection": selection, "drift": drift}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="study", required=True)
    for name, study in _STUDIES.items():
        study.add_arguments(commands.add_parser(name, help=study.__doc__.splitlines()[0]))
    args = parser.parse_args()
    _STUDIES[args.study].run(args)


if __name__ == "__main__":
    main()
