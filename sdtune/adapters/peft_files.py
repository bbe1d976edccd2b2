"""What PEFT reads, beside a tuner or LoRA file: adapter_config.json, and the same weights under PEFT's keys."""

import re
import tempfile
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from ..tuners.config import KINDS, LINEAR_LAYERS, LORAS
from . import disk
from .operations import CHILD_NAME
from .peft_config import ResAttnConfig
from .tuner_file import PEFT_FILE_NAME, TunerFile, write_tensors

_LORA_A = ".lora_A.weight"
# a key of a tuner: the path of the operation, or of a layer of it, and the parameter; a layer's path is the longer one
_PLACES = "|".join(re.escape(name) for name in (*chain(*LINEAR_LAYERS.values()), *LINEAR_LAYERS))
_KEY = re.compile(
    rf"(.*\.transformer_blocks\.\d+(?:\.(?:{_PLACES}))?|.*\.(?:conv1|conv2|conv_shortcut|proj_in|proj_out))\.(.+)"
)


def save_peft_files(folder: Path, file: TunerFile) -> None:
    """Writes what `PeftModel.from_pretrained(unet, folder)` reads, each file atomically.

    PEFT reads its own keys and file names only, so this is a copy of the weights in the tuner file. There is none of a
    full fine-tuning, which would be as large as the UNet, none of the kinds that are there for comparisons on vision
    models, and none of a tuner of a vision model.
    """
    if file.config.kind not in (*KINDS, *LORAS) or "family" in file.base:
        return
    tensors, base, rank = {}, file.base.get("name"), file.config.rank
    if file.config.kind in LORAS:
        layers = [key.removesuffix(_LORA_A) for key in file.tensors if key.endswith(_LORA_A)]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, use_dora=file.config.kind == "dora")
        tensors = {f"base_model.model.{key}": tensor for key, tensor in file.tensors.items()}
    else:
        config = ResAttnConfig(**asdict(file.config))
        for key, tensor in file.tensors.items():
            operation, parameter = _KEY.fullmatch(key).groups()
            tensors[f"base_model.model.{operation}.{CHILD_NAME}.tuners.{parameter}"] = tensor
    config.base_model_name_or_path, config.inference_mode = base, True
    write_tensors(folder / PEFT_FILE_NAME, tensors, {"format": "pt"})
    with tempfile.TemporaryDirectory() as written:  # PEFT writes into a folder
        config.save_pretrained(written)
        disk.write_bytes(folder / CONFIG_NAME, (Path(written) / CONFIG_NAME).read_bytes())
