"""Tuners as a method of PEFT: `get_peft_model`, `PeftModel.from_pretrained`, and diffusers' `unet.add_adapter`.

PEFT has no way to register a method from outside, since its `register_peft_method` takes members of an enum only; but
what that does is to enter two classes and a prefix into three dictionaries, for which a string is as good a key.
"""

import re
from dataclasses import asdict
from pathlib import Path

from peft import mapping
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import save_file

from . import inject
from .hook import PEFT_TYPE, ParallelTuners, TunerPeftConfig, cannot_fuse_message
from .operations import CHILD_NAME
from .tuner_file import TunerFile

_OPERATION = re.compile(r"(.*\.transformer_blocks\.\d+(?:\.(?:attn1|attn2|ff))?)\.(.+)")


class TunerPeftModel(BaseTuner):
    """What PEFT wraps around a UNet; the tuner itself is added by `inject`, as `add_tuner` does."""

    prefix = "tuners"  # before the adapter's name in the keys of `ParallelTuners`
    tuner_layer_cls = ParallelTuners

    def inject_adapter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, **_):
        """Adds a fresh tuner. Its dtype is the model's, and `low_cpu_mem_usage` has no effect: tuners are small."""
        model.peft_config = self.peft_config
        config = self.peft_config.pop(adapter_name)
        inject.add_adapter(model, config.tuner, adapter_name)
        self.peft_config[adapter_name] = config
        self._mark_only_adapters_as_trainable(model)
        if config.inference_mode:
            model.requires_grad_(False)

    def _create_and_replace(self, *args, **kwargs):
        raise NotImplementedError("tuners run in parallel to a module; nothing is replaced")

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs):
        if merge:
            raise ValueError(cannot_fuse_message(self.active_adapters))
        for name in list(self.peft_config):
            inject.remove_adapter(self.model, name)
        return self.model

    @staticmethod
    def _remove_adapter_name_from_key(key: str, adapter_name: str) -> str:
        # PEFT's own removes a name only before the last part of a key
        return key.replace(f".tuners.{adapter_name}.", ".tuners.", 1)


def save_peft_files(folder: Path, file: TunerFile) -> None:
    """Writes adapter_config.json and adapter_model.safetensors for `PeftModel.from_pretrained(unet, folder)`."""
    TunerPeftConfig(**asdict(file.config), base_model_name_or_path=file.base.get("name")).save_pretrained(str(folder))
    tensors = {}
    for key, tensor in file.tensors.items():
        operation, parameter = _OPERATION.fullmatch(key).groups()
        tensors[f"base_model.model.{operation}.{CHILD_NAME}.tuners.{parameter}"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")


def register() -> None:
    """Makes the method known to PEFT. An entry of that name that somebody else made is left as it is."""
    if mapping.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(PEFT_TYPE, TunerPeftConfig) is TunerPeftConfig:
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = TunerPeftModel
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = TunerPeftModel.prefix


register()
