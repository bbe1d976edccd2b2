"""Tuners as a method of PEFT: `get_peft_model`, `PeftModel.from_pretrained`, and diffusers' `unet.add_adapter`.

This module is imported with PEFT (`peft_registration`), perhaps while diffusers is being imported; what needs diffusers
is therefore imported inside the methods.
"""

from peft.tuners.tuners_utils import BaseTuner

from ..tuners.config import NOAH


class ResAttnModel(BaseTuner):
    """What PEFT wraps around a UNet; the tuner itself is added by `inject`, as `add_tuner` does."""

    prefix = "tuners"  # before the adapter's name in the keys of `hook.ParallelTuners`

    @property
    def tuner_layer_cls(self):
        from .hook import ParallelTuners

        return ParallelTuners

    def inject_adapter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, **_):
        """Adds a fresh tuner. Its dtype is the model's, and `low_cpu_mem_usage` has no effect: tuners are small."""
        from . import inject

        if self.peft_config[adapter_name].kind == NOAH:
            raise ValueError(
                f"{NOAH} consists of several adapters, which get_peft_model cannot add; use sdtune.add_tuner"
            )
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
        from . import hook, inject

        if merge:
            raise ValueError(hook.cannot_fuse_message(self.active_adapters))
        for name in list(self.peft_config):
            inject.remove_adapter(self.model, name)
        return self.model

    @staticmethod
    def _remove_adapter_name_from_key(key: str, adapter_name: str) -> str:
        # PEFT's own removes a name only before the last part of a key
        return key.replace(f".tuners.{adapter_name}.", ".tuners.", 1)
