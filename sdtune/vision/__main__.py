"""`python -m sdtune.vision`: prints a line, then imports PyTorch, which takes seconds, and runs the command."""

import sys

from ..training import launch

if __name__ == "__main__":
    launch.start_quietly()
    from .command import main

    sys.exit(main())
