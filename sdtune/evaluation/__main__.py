"""`python -m sdtune.evaluation`: prints a line, then imports PyTorch, which takes seconds, and runs the command."""

import os
import sys

from ..training import launch


def choose_gpu() -> None:
    """Shows this process one GPU alone, if it is one of several; before CUDA starts, which importing diffusers does."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        local = int(os.environ.get("LOCAL_RANK", 0))
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible else str(local)


if __name__ == "__main__":
    choose_gpu()
    launch.start_quietly()
    from .command import main

    sys.exit(main())
