"""The configuration of a tuner among PEFT's: the entry in `unet.peft_config`, and what adapter_config.json holds."""

from dataclasses import dataclass, fields

from peft import PeftConfig

from ..tuners.config import LORAS, PEFT_METHODS, TunerConfig

PEFT_TYPE = "SDTUNE"  # the method's name in PEFT; without sdtune, PEFT's KeyError then names what is missing


@dataclass
class ResAttnConfig(PeftConfig):
    """The fields of `TunerConfig`, as a configuration of PEFT: `peft.get_peft_model(unet, ResAttnConfig(rank=8))`.

    It is named as PEFT names its configurations, after the method, and there is one for all kinds of tuner, as
    `LoraConfig(use_dora=True)` is DoRA's: `ResAttnConfig(kind="res_adapter")`.

    Raises:
        ValueError: listing every field that is out of range.
    """

    kind: str = "res_attn"
    rank: int = 4
    num_heads: int = 4
    ops: list[str] | None = None  # the kind's default
    qkv_bias: bool = False
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    length: int = 10
    ffn_kind: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.kind in (*LORAS, *PEFT_METHODS):
            own = "LoraConfig with use_dora=True" if self.kind == "dora" else "own configuration"
            raise ValueError(f"kind is {self.kind!r}, a method of PEFT; use PEFT's {own} for it")
        self.ops = self.tuner.ops  # raises ValueError for fields out of range

    @property
    def tuner(self) -> TunerConfig:
        return TunerConfig(**{f.name: getattr(self, f.name) for f in fields(TunerConfig)})
