"""`python -m sdtune.benchmark`: prints a line, then imports PyTorch, which takes seconds, and runs the command."""

import sys
from contextlib import redirect_stdout

from ..training import launch

if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # stdout has the report alone
        launch.start_quietly()
    from .command import main

    sys.exit(main())
