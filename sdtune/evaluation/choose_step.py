"""Which checkpoint of a run should be kept? `python -m sdtune.evaluation.choose_step --help`

    python -m sdtune.evaluation.choose_step output/mine

Draws held-out prompts with every checkpoint from the same noise into one sheet, scores each by the metrics of
`sdtune.evaluation` (extra `evaluate`), and recommends one: the earliest that is beyond doubt worse than the best
neither in likeness to the true pictures, nor in following its prompt, and that does not copy the training pictures.
Written into the folder of the run: steps.png and steps.md. The work is done in `checkpoint_scores`.
"""

import argparse
import sys
from pathlib import Path

from ..extras import MissingPackages
from ..training import launch
from ..training.errors import TrainError


def main(argv: list[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.evaluation.choose_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="the output of a training with held-out pictures", type=Path)
    parser.add_argument("--prompts", help="most held-out prompts (default: 8)", type=int, default=8)
    parser.add_argument("--drawing_steps", help="sampling steps of a picture (default: 20)", type=int, default=20)
    options = parser.parse_args(argv)
    if options.prompts < 2 or options.drawing_steps < 1:
        parser.error("prompts must be at least 2, and drawing_steps at least 1")
    from . import checkpoint_scores  # imports PyTorch, so it comes after the first line that the user sees

    try:
        found = checkpoint_scores.choose(options.folder, options.prompts, options.drawing_steps)
    except (TrainError, ValueError, OSError, MissingPackages) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    print((options.folder / checkpoint_scores.TABLE_NAME).read_text(encoding="utf-8"))
    if found.step:
        print(f"its tuner: {found.tuner()}")
    print(f"the sheet: {found.sheet}")
    return 0


if __name__ == "__main__":
    launch.start_quietly()
    sys.exit(main())
