"""The methods by name: what is trained, with which learning rate, and what the paper prints as its parameters."""

import re
from dataclasses import dataclass

from ..tuners.config import ALL_KINDS, FULL, KINDS, LINEAR, LORAS, NOAH, PEFT_METHODS, TUNER_OPS, TunerConfig

# Settings of the comparisons of VPT, NOAH, SSF and Res-Tuning on ViT-B/16; what is not here is TunerConfig's default.
_SETTINGS = {
    "adapter": {"length": 96, "ops": ["ff"]},
    "lora": {"rank": 8, "ops": ["attn1"]},
    "noah": {"rank": 5, "length": 5},
} | {kind: {"rank": 8, "ops": ["attn1"]} for kind in ("dora", *PEFT_METHODS)}
_RATES = {FULL: 1e-4}  # the others 1e-3, as in NOAH's and SSF's code
# The Param. column of arXiv 2312.16916, Tables 1a and 2, in millions, as printed; see assets/results/vision.md.
PAPER_PARAMETERS = {
    "full": 85.84, "linear": 0.04, "adapter": 1.82, "lora": 0.29, "vpt": 0.60, "ssf": 0.24, "noah": 0.42,
    "res_attn": 1.25, "res_attn-8x8@attn1": 2.35, "res_attn-8x4@attn1": 1.22, "res_attn-4x4@attn1": 0.66,
    "res_attn-2x4@attn1": 0.32,
}  # fmt: skip
DEFAULT = (
    "linear", "full", "adapter", "lora", "vpt", "ssf", "noah", "bypass", "res_adapter", "res_prefix", "res_prompt",
    "res_attn", "res_attn-4x4@attn1",
)  # fmt: skip
_NAME = re.compile(r"(?P<kind>[a-z_0-9]+?)(-(?P<a>\d+)(x(?P<b>\d+))?)?(@(?P<ops>[a-z0-9+]+))?(:(?P<ffn>[a-z_]+))?")
HELP = (
    "KIND, or KIND-RANKxHEADS (Res-Attn), KIND-SIZE (rank of LoRA, OFT, LoKr; length of the others), with @OPS joined "
    f"by + out of attn1, ff, block, and :KIND for another kind on ff; for example res_attn-8x4@attn1+ff:res_adapter. "
    f"Kinds: {', '.join(ALL_KINDS)}"
)


@dataclass(frozen=True)
class Method:
    """A method: its name as given, its configuration, and its usual learning rate."""

    name: str
    config: TunerConfig

    @property
    def rate(self) -> float:
        return _RATES.get(self.config.kind, 1e-3)


def parse_method(name: str) -> Method:
    """The method of a name such as "lora", "res_attn-8x4@attn1" or "res_prefix@attn1+ff:res_adapter".

    Raises:
        ValueError: in a sentence, if there is none.
    """
    match = _NAME.fullmatch(name)
    if not match or match["kind"] not in ALL_KINDS:
        raise ValueError(f"{name!r} is no method; expected {HELP}")
    kind, settings = match["kind"], dict(_SETTINGS.get(match["kind"], {}))
    if match["b"]:
        if not kind.startswith("res_attn"):
            raise ValueError(f"{name!r}: only Res-Attn has a rank and heads, such as res_attn-8x4")
        settings |= {"rank": int(match["a"]), "num_heads": int(match["b"])}
    elif match["a"]:
        size = int(match["a"])
        if kind == NOAH:
            settings |= {"rank": size, "length": size}
        elif kind in (*LORAS, *PEFT_METHODS) or kind.startswith("res_attn"):
            settings["rank"] = size
        elif kind in (FULL, LINEAR, "ssf"):
            raise ValueError(f"{name!r}: {kind} has no size")
        else:
            settings["length"] = size
    if match["ops"]:
        settings["ops"] = match["ops"].split("+")
        wrong = [op for op in settings["ops"] if op not in TUNER_OPS or op == "attn2"]
        if wrong:
            raise ValueError(
                f"{name!r}: there is no {', '.join(wrong)} in a vision model; possible are attn1, ff, block"
            )
    if match["ffn"]:
        if match["ffn"] not in KINDS:
            raise ValueError(f"{name!r}: {match['ffn']} cannot be on ff; possible are {', '.join(KINDS)}")
        settings["ffn_kind"] = match["ffn"]
    try:
        return Method(name, TunerConfig(kind=kind, **settings))
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
