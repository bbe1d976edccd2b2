"""Writes a LoRA or DoRA file for other programs: `python -m sdtune.adapters.export FILE --to kohya`.

sdtune writes LoRAs in kohya's key names anyway. A DoRA it writes in PEFT's, which diffusers reads exactly; ComfyUI,
Forge and others read kohya's names, with `dora_scale` for the magnitudes m. As in LyCORIS they stand for
m * (W + BA) / |W + BA|, with the norm of each output. ComfyUI and Forge compute m * (W + BA) / |W|
(github.com/Comfy-Org/ComfyUI/pull/15458, open in August 2026), which is near to it only.
"""

import argparse
import sys
from pathlib import Path

from safetensors import safe_open

from ..tuners.config import KINDS, LORAS
from . import tuner_file


def export_to_kohya(source: str | Path, target: str | Path | None = None) -> Path:
    """Writes a LoRA or DoRA in kohya's key names, with the metadata of the file.

    Args:
        source: a file of sdtune.
        target: the file to write; by default "<name>-kohya.safetensors" beside it.

    Returns:
        The path of the new file, which sdtune reads as it reads the files of other tools.

    Raises:
        TunerFileError: if the file is neither a LoRA nor a DoRA of sdtune.
    """
    source = tuner_file.find(source)
    file = tuner_file.load(source)
    if file.config.kind not in LORAS:
        way = "use sdtune's node for ComfyUI or its extension for Forge, in sdtune/integrations"
        if file.config.kind not in KINDS:
            way = "only diffusers can load it, with sdtune.load_tuner"
        raise tuner_file.TunerFileError(
            f"{source} holds a {file.config.kind}, which sdtune does not write in kohya's format; {way}"
        )
    tuner_file.check_family(file, {}, source)
    magnitude = ".lora_magnitude_vector"
    tensors = tuner_file.kohya_tensors({k: t for k, t in file.tensors.items() if not k.endswith(magnitude)})
    for key, tensor in file.tensors.items():
        if key.endswith(magnitude):
            path = key.removesuffix(magnitude)
            ones = file.tensors[f"{path}.lora_B.weight"].dim() - 1
            name = f"lora_unet_{path.replace('.', '_')}.dora_scale"
            tensors[name] = tensor.reshape(-1, *[1] * ones).contiguous()
    target = Path(target).expanduser() if target else source.with_name(f"{source.stem}-kohya.safetensors")
    if target.exists() and target.samefile(source):
        raise tuner_file.TunerFileError(
            f"{target} is the file itself, which stays as it is; give --output another name"
        )
    with safe_open(source, framework="pt") as f:
        metadata = {k: v for k, v in f.metadata().items() if not k.startswith("sdtune.format")}
    tuner_file.write_tensors(target, tensors, metadata)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sdtune.adapters.export", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="a LoRA or DoRA that sdtune wrote")
    parser.add_argument("--to", choices=["kohya"], default="kohya", help="the key names to write")
    parser.add_argument("--output", help="the file to write; default: <name>-kohya.safetensors beside it")
    args = parser.parse_args()
    try:
        print(export_to_kohya(args.file, args.output))
        if tuner_file.load(args.file).config.kind == "dora":
            print(
                "note: ComfyUI and Forge scale a DoRA by another norm than diffusers, so they draw a picture near to "
                "that of diffusers, not the same; a LoRA draws the same",
                file=sys.stderr,
            )
    except (tuner_file.TunerFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
