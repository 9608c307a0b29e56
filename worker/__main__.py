"""`python -m worker` is `exarq`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that was typed."""
    if sys.argv[1:] in (["check"], ["check", "--json"]):  # asked every few seconds: typer alone would cost more
        from worker.check import check

        sys.exit(check(as_json="--json" in sys.argv))
    from worker.cli import main

    main()


if __name__ == "__main__":
    main()
