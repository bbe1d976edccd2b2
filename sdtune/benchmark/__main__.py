"""`python -m sdtune.benchmark`: prints a line, then imports PyTorch, which takes seconds, and runs the command."""

import sys

if __name__ == "__main__":
    print("loading PyTorch and diffusers ...", file=sys.stderr, flush=True)
    from .command import main

    sys.exit(main())
