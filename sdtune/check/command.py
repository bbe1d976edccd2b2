"""Which pictures of a set deserve a look, before a training or after it? `python -m sdtune.check --help`

    python -m sdtune.check my/pictures                        # before: copies, blur, size, what cropping cuts, captions
    python -m sdtune.check my/pictures --trigger_words "sks"  # and whether the base knows these words already
    python -m sdtune.check my/pictures --base path/to/sd-v1-5 # for this base: its size in px, and the words it knows
    python -m sdtune.check output/mine                        # after: the loss of each picture over the run

Writes a page of thumbnails with a sentence each (it needs no other file), and prints the sentences about pictures that
are worth a look.
"""

import argparse
import sys
from pathlib import Path

from .. import paths
from ..bases import load
from ..training.buckets import AspectBuckets
from ..training.config import TrainConfig
from ..training.errors import TrainError
from . import after, before, words
from .sheet import Card, write_page


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="of images and captions (or a hub data set), or the output of a training")
    parser.add_argument("--trigger_words", default="", help="words that would be put before every caption")
    parser.add_argument(
        "--base", default=TrainConfig.base, help="the base that you will train on (default: tiny-sd, of 256 px)"
    )
    parser.add_argument("--resolution", type=int, help="as in train_anime.py")
    parser.add_argument("--square", action="store_true", help="as in train_anime.py")
    parser.add_argument("--output", help="the page to write; default: output/check-NAME.html")
    options = parser.parse_args(argv)
    try:  # with the ranges of a training's settings
        TrainConfig(resolution=options.resolution)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns its exit status."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    folder = paths.find(options.folder) or Path(options.folder)
    path = Path(options.output or f"output/check-{folder.resolve().name}.html")
    try:
        if after.is_run(folder):
            title = f"The pictures of {options.folder} over the run"
            lines, cards = after.check_run(folder, print)
        else:
            title = f"The pictures of {options.folder} before a training"
            lines, cards = _check_set(options)
        write_page(path, title, lines, cards)
    except (TrainError, ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    print("\n".join(lines))
    for card in cards:
        if card.noted:
            print(f"  {card.title}: {card.text}")
    print(f"all {len(cards)} pictures are in {path}")
    return 0


def _check_set(options: argparse.Namespace) -> tuple[list[str], list[Card]]:
    buckets = AspectBuckets(options.resolution or load.native_resolution(options.base), options.square)
    report = before.check_set(options.folder, buckets)
    lines = list(report.lines)
    if not report.heldout:
        lines.append(
            "no pictures are held out, so a run cannot tell when it begins to memorise; one of five, in a folder test/ "
            "next to train/, would do"
        )
    lines += words.describe_words(options.trigger_words)
    if options.trigger_words:
        lines.append(words.measure_words(options.trigger_words, report.pairs, options.base, buckets))
    return lines, report.cards
