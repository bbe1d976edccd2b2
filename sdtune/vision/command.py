"""Image classification with a vision transformer: `python -m sdtune.vision --help`

    python -m sdtune.vision --data my/classes --kinds linear lora res_attn
    python -m sdtune.vision --data vtab/cifar vtab/dtd --grid --mixed_precision bf16

`--data` takes folders of class folders (with `train` and `test`, or without), VTAB-1K's list files, CIFAR-100's
binary, idx files, or a hub data set. Every method trains with several seeds by the protocol of NOAH and SSF and is
measured on the test pictures. The output folder gets table.md, accuracy.png and results.json, and for the first seed of
every method the classifier and a picture of its mistakes. Finished runs are kept and skipped; an interrupted one
continues.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from ..bases.errors import BaseError
from .augmentation import AUGMENTATIONS
from .experiment import Experiment, Settings, SettingsError
from .methods import DEFAULT, HELP


def _parse(argv: list[str]) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.vision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="data sets, as above")
    add("--base", help=f"hub id or folder of a ViT, DeiT or DINOv2 (default: {default.base})")
    add("--kinds", nargs="+", help=f"methods; {HELP}. Default: {' '.join(DEFAULT)}")
    add("--seeds", type=int, help=f"training seeds of each method (default: {default.seeds})")
    add("--epochs", type=int, help=f"passes over the training pictures (default: {default.epochs})")
    add("--batch_size", type=int, help=f"pictures of a step (default: {default.batch_size})")
    rates = "learning rates, for full a tenth; of several the best on the validation pictures is taken (default: 1e-3)"
    add("--rates", type=float, nargs="+", help=rates)
    add("--grid", action="store_true", default=None, help="choose rate and weight decay on the validation pictures")
    add("--choose_on_first", action="store_true", default=None, help="choose them on the first data set, for all")
    add("--image_size", type=int, help="side of the pictures in pixels (default: the base's, at most 224)")
    add("--layers", type=int, help="use the first so many blocks of the base only")
    add("--train_size", type=int, help="about how many training and validation pictures, at random (default: all)")
    augment = "of the training pictures: random crops and flips, or all of SSF's for CIFAR-100 (default: none)"
    add("--augment", choices=AUGMENTATIONS, help=augment)
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="precision of the base's arithmetic (default: no)")
    add("--output", help=f"folder for the results (default: {default.output})")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    low = [n for n in ("seeds", "epochs", "batch_size", "train_size") if given.get(n, 1) < 1]
    low += ["rates"] if any(r <= 0 for r in given.get("rates", [])) else []
    if low:
        parser.error(f"too low: {', '.join(low)}; each must be above 0")
    assert given.keys() <= {f.name for f in fields(Settings)}
    return Settings(**given)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns its exit status."""
    settings = _parse(sys.argv[1:] if argv is None else argv)
    try:
        experiment = Experiment(settings)
        experiment.run()
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept, and the same command continues from there", file=sys.stderr)
        return 130
    except SettingsError as error:
        print(f"\nerror: this cannot start:\n{error}", file=sys.stderr)
        return 1
    except (BaseError, RuntimeError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    folder = Path(settings.output) / experiment.data[0].name / experiment.methods[-1].name / "seed-0"
    print("\nLoad a classifier:\n\n  from sdtune.vision import load_classifier")
    print(f'  classifier = load_classifier("{folder}")\n  print(classifier.predict("photo.jpg"))')
    return 0
