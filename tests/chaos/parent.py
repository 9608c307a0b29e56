"""`exarq run` with several processes, as a program that does not outlive the run."""

from __future__ import annotations

import sys

from tests.chaos.worker import die_with_parent
from worker.cli import main

if __name__ == "__main__":
    die_with_parent()
    sys.argv = ["exarq", "run"]
    main()
