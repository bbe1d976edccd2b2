"""Makes tuners known to PEFT, so that `import sdtune` is all that `PeftModel.from_pretrained(unet, folder)` needs.

`import sdtune` imports no PEFT, which takes seconds and which ComfyUI lacks. Where PEFT is imported later, a finder in
`sys.meta_path` registers tuners right after that.
"""

import sys
import warnings
from importlib.abc import MetaPathFinder


def register_with_peft() -> None:
    """Registers tuners with PEFT now, if it is imported, or else as soon as it is."""
    if sys.modules.get("peft"):
        _register()
    else:
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Finds the package peft by the other finders, and has `_register` called after its import."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((found for found in others if found), None)
        if spec:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    """Enters the configuration, the model and the prefix of its keys into PEFT's dictionaries.

    This is what PEFT's `register_peft_method` does, which takes members of an enum only; a string is as good a key. An
    entry of that name that somebody else made is left as it is, and an error does not stop the import of PEFT.
    """
    try:
        from peft import mapping

        from .peft_config import PEFT_TYPE, ResAttnConfig
        from .peft_model import ResAttnModel

        if mapping.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(PEFT_TYPE, ResAttnConfig) is ResAttnConfig:
            mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = ResAttnModel
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = ResAttnModel.prefix
    except Exception as error:
        warnings.warn(f"sdtune could not make its tuners known to this version of PEFT: {error!r}", stacklevel=2)
