"""A small share of the harness; `python -m tests.reliability` runs all of it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_share_of_bad_inputs_and_killed_runs_has_no_failure():
    command = [sys.executable, "-m", "tests.reliability", "--seed", "0", "--share", "0.05", "--kills", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
