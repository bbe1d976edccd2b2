"""Trains a Res-Attn tuner on image-caption pairs; by default on the 30 anime pairs and the small base in assets/.

    accelerate launch train_anime.py
    accelerate launch train_anime.py --base path/to/sd-v1-5 --data my/pictures --output output/mine

Every flag is a field of `sdtune.TunerConfig` or `sdtune.TrainConfig`; `--help` lists them. The training itself is
`sdtune.fit`, in sdtune/training/fit.py.
"""

import argparse
import os
import sys

from sdtune.kernels.cpu import heap
from sdtune.training import launch
from sdtune.training.errors import Stopped, TrainError, is_out_of_memory

HOW_TO_LOAD = """
Load it and draw with:

from sdtune import compare, load_base, load_tuner
pipe = load_base("{base}")
load_tuner(pipe, "{tuner}", adapter_name="{name}")
compare(pipe, "a prompt", {{"{name}": {{"{name}": 1.0}}}})["{name}"][0].save("picture.png")
"""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def main() -> int:
    processes = launch.requested_processes(os.path.basename(__file__))
    if processes > 1:
        launch.replace_with_processes(processes, [__file__], sys.argv[1:])
    launch.print_start()

    # these imports take seconds, so they come after the first line that the user sees
    from transformers.hf_argparser import HfArgumentParser

    import sdtune
    from sdtune.training.config import DEFAULT_KIND
    from sdtune.training.config_file import expand_arguments

    parser = HfArgumentParser(
        (sdtune.TunerConfig, sdtune.TrainConfig), description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=Help,
    )  # fmt: skip
    parser.set_defaults(kind=DEFAULT_KIND)
    parser.add_argument("--config", metavar="FILE", help="settings in YAML or JSON, named as the flags, which win; "
                        "also the config.json of a run, which is then repeated")  # fmt: skip
    try:
        arguments = expand_arguments(sys.argv[1:])
        tuner, config, *_, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"there are no flags or values for {' '.join(unknown)}; --help lists all flags")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    launch.silence_libraries()
    try:
        result = sdtune.fit(config, tuner)
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.signum
    except (TrainError, ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "a smaller --batch_size with --gradient_accumulation_steps, or --gradient_checkpointing, needs less"
        print(f"\nerror: the memory is full; {advice}. What is in the output folder stays", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped while no step was running; what is in the output folder stays", file=sys.stderr)
        return 130

    if result.main:
        name = "anime" if config.output is None else "mine"
        print(f"\nthe tuner     {result.tuner}\nthe preview   {result.preview}\nthe losses    {result.loss_plot}")
        print(f"the settings  {result.config}")
        print(f"which of the pictures it never learnt, or by heart: python -m sdtune.check {result.config.parent}")
        print(HOW_TO_LOAD.format(base=config.base, tuner=result.tuner, name=name))
    return 0


if __name__ == "__main__":
    heap.restart_with_heap_settings()
    sys.exit(main())
