"""`make chaos`: break the system for a while, show what is broken, and count what that cost."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.faults import catalogue
from tests.chaos.run import EVERY, MIX, Plan, run


def main() -> int:
    """Parse the arguments and run; 0 when every invariant held."""
    faults = catalogue()
    listed = "\n".join(f"  {fault.name:20} {fault.says}" for fault in faults.values())
    parser = argparse.ArgumentParser(
        prog="make chaos",
        description=__doc__,
        epilog=f"faults:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60, help="no fault begins after so long (60)")
    parser.add_argument("--seed", default="1", help="which faults come when, and in what mix (1)")
    parser.add_argument(
        "--fault", default=MIX, metavar="FAULT",
        help=f"one of the faults below again and again; `{EVERY}`: each of them once; `{MIX}`: at random, some together",
    )  # fmt: skip
    parser.add_argument("--lease", type=float, default=2, help="worker.lease in seconds; 10 is the users' default (2)")
    parser.add_argument("--rate", type=float, default=120, help="enqueues a second (120)")
    asked = parser.parse_args()
    if asked.fault not in (MIX, EVERY, *faults):
        parser.exit(2, f"no fault {asked.fault!r}; `make chaos FAULT=help` lists them\n")
    if asked.seconds <= 0 or asked.lease < 1 or asked.rate <= 0:
        parser.error("--seconds and --rate must be more than 0, --lease at least 1")
    plan = Plan(asked.fault, asked.seconds, asked.seed, asked.lease, asked.rate)
    folder, keep = Path(tempfile.mkdtemp(prefix="exarq-chaos-")), True
    try:
        code = asyncio.run(run(plan, folder))
        keep = code != 0
        return code
    except KeyboardInterrupt:
        keep = False
        print("interrupted; everything that was started is gone", file=sys.stderr)
        return 130
    finally:
        if keep:
            print(f"what the processes noted and logged is kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
