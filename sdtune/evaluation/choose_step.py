"""`python -m sdtune.evaluation.choose_step RUN`: prints a line, then imports PyTorch, and runs `step_chooser`."""

import sys

from ..training import launch

if __name__ == "__main__":
    launch.start_quietly()
    from .step_chooser import main

    sys.exit(main())
