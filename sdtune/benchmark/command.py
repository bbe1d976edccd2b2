"""Speed and memory, compared on one machine in one run: `python -m sdtune.benchmark --help`.

A training step of diffusers' train_text_to_image_lora.py, of our trainer with Res-Attn and with LoRA, and of the frozen
UNet alone, which is the floor; a picture of the base as diffusers and as we load it, with a Res-Attn, with a LoRA of
equal parameters as it is and fused. The candidates alternate, each in a process of its own, so the ratios hold on a
machine whose speed varies, and no candidate profits from the settings of another.
"""

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .. import kernels
from ..bases import load
from .bases import sd15_shape
from .candidates import RES_ATTN, Job
from .parts import PARTS, ROOT
from .processes import log
from .report import check_targets, describe_machine, markdown_table

DEFAULT_PARTS = ("train", "draw", "memory", "imports")


def _parse(arguments: list[str] | None, cuda: bool) -> argparse.Namespace:
    parts = "\n".join(f"  {name:8} {text}" for name, (_, text) in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.benchmark", description=__doc__.split("\n\n")[1], epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("parts", nargs="*", metavar="part", help=f"what to measure; default: {' '.join(DEFAULT_PARTS)}")
    add("--base", default="tiny-sd", help="tiny-sd, sd15-shape (random weights), or any base")
    add("--resolution", type=int, help="side in px; default: the base's own, on a CPU at most 256")
    add("--batch", type=int, nargs="+", default=[1, 4], help="images per step; default: 1 4")
    add("--precision", choices=("no", "fp16", "bf16"), help="default: fp16 on CUDA, no on a CPU")
    add("--rounds", type=int, default=20 if cuda else 7, help="how many turns each candidate has")
    add("--quick", action="store_true", help="one round of the smallest setting of every part, to see that it runs")
    add("--json", metavar="FILE", help="write all numbers to this file, too")
    options = parser.parse_args(arguments)
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"no part named {', '.join(wrong)}; possible: {', '.join(PARTS)}")
    if "kernels" in options.parts and (cuda or not kernels.is_enabled()):
        parser.error(
            "the part kernels compares the kernels for CPUs, which are not in use here; run it with "
            "CUDA_VISIBLE_DEVICES= and without SDTUNE_KERNELS=off"
        )
    if options.quick:
        options.rounds, options.batch, options.resolution = 1, [1], 64
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns its exit status."""
    cuda = torch.cuda.is_available()
    options = _parse(arguments, cuda)
    try:
        base = sd15_shape() if options.base == "sd15-shape" else options.base
        native = load.native_resolution(base)
        if options.json:
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            Path(options.json).touch()  # before hours of measuring
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    machine, rows = describe_machine(), {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it: report what there is, as on Ctrl-C
    with tempfile.TemporaryDirectory() as work_folder:
        job = Job(
            "train", RES_ATTN, base, str(ROOT / "assets/anime"), work_folder,
            resolution=options.resolution or (native if cuda else min(native, 256)), batch=options.batch[0],
            precision=options.precision or ("fp16" if cuda else "no"), repetitions=1 if options.quick else 5,
            sampling_steps=1 if options.quick else 50 if cuda else 10,
        )  # fmt: skip
        print(", ".join(f"{k} {v}" for k, v in machine.items()), end="\n\n")
        print(f"base {options.base}, {job.resolution} px, precision {job.precision}, {options.rounds} rounds")
        for part in options.parts or DEFAULT_PARTS:
            measure, text = PARTS[part]
            log(f"{part}: {text}")
            rows[part], stopped = [], False
            try:
                for row in measure(replace(job, part=part), options):
                    rows[part].append(row)
            except KeyboardInterrupt:
                stopped = True
                log(f"stopped in {part}; the report has what was measured before")
            steps = f", {job.sampling_steps} sampling steps" if part == "draw" else ""
            print(f"\n**{part}**: {text}{steps}\n\n{markdown_table(rows[part])}", flush=True)
            if stopped:
                break
    targets = check_targets(rows, cuda)
    print(f"\n**targets**\n\n{markdown_table(targets)}")
    if options.json:
        report = {"machine": machine, "settings": {**vars(options), **asdict(job)}, **rows, "targets": targets}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0
