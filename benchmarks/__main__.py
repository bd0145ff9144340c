"""Measure the project side by side with its peers, and write the page of results.

python -m benchmarks NAME --json FILE        one benchmark; `all` for all of them
python -m benchmarks page FILE [FILE ...]    benchmarks/results.md and its plots
"""

import os
import sys


def main() -> None:
    """One thread, set before torch and numpy are imported: a ratio must not depend on who else is
    on the machine.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up on the network
    from benchmarks.command import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
