"""Searches for inputs that sdtune mishandles and for moments at which a kill loses something.

    python -m tests.reliability --seed 0 --report assets/results/reliability.md
    python -m tests.reliability --seed 1 --only "LoRA file"
    python -m tests.reliability --share 0.05 --kills 4

Exits with 1 if there is a failure. The tests run a small share of it.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from sdtune.training import launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of what is changed in the inputs, and of the kills")
    parser.add_argument("--share", type=float, default=1.0, help="share of the bad inputs to run")
    parser.add_argument("--only", default="", help="only inputs with this text in their titles")
    parser.add_argument("--kills", type=int, default=50, help="how many runs to kill")
    parser.add_argument("--report", type=Path, help="a Markdown file to write the figures to")
    args = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",  # read once, when the hub's client is imported
        "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
    }  # fmt: skip
    launch.silence_libraries()
    from . import bad_inputs, kills, report

    started = time.monotonic()
    trials = kills.run_trials(args.kills, args.seed)
    killed = time.monotonic() - started
    outcomes = bad_inputs.run_all(args.seed, args.share, args.only)
    seconds = time.monotonic() - started
    failures = [o for o in outcomes if o.result == "failure"]
    faults = [t for t in trials if t.fault]
    counts = Counter(o.result for o in outcomes)
    print(
        f"\n{len(outcomes)} bad inputs: {counts['right']} right, {counts['refused']} refused, {len(failures)} failures"
    )
    print(f"{sum(len(t.kills) for t in trials)} kills in {len(trials)} runs: {len(faults)} failures")
    for outcome in failures:
        print(f"FAILURE {outcome.title}: {outcome.text}")
    for trial in faults:
        print(f"FAILURE {trial.settings}, killed {'; '.join(trial.kills)}: {trial.fault}")
    if args.report:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        args.report.write_text(report.write(args.seed, commit, outcomes, trials, killed, seconds), encoding="utf-8")
    return 1 if failures or faults else 0


if __name__ == "__main__":
    sys.exit(main())
