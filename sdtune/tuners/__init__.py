"""What is trained: small modules beside a frozen operation, `x' = OP(x) + tuner(x)`. PyTorch is all that this needs.

`res_attn.py` is Algorithm 1 of Res-Attn (arXiv 2312.16916). One kind of tuner is one file; `config.py` names them all.
"""

from .base import Context, Tuner, Widths
from .config import BASELINES, FULL, KINDS, LORAS, OPS, TUNER_OPS, TunerConfig, build_tuner, fields_of
from .full import FullTuning
from .res_adapter import ResAdapter
from .res_attn import ResAttn
from .res_attn_conv import LowRankConvolution, ResAttnConv
from .res_attn_layer import ResAttnLayer
from .res_attn_text import ResAttnText
from .res_prefix import ResPrefix
from .res_prompt import ResPrompt

__all__ = [
    "BASELINES", "FULL", "KINDS", "LORAS", "OPS", "TUNER_OPS", "Context", "FullTuning", "LowRankConvolution",
    "ResAdapter", "ResAttn", "ResAttnConv", "ResAttnLayer", "ResAttnText", "ResPrefix", "ResPrompt", "Tuner",
    "TunerConfig", "Widths", "build_tuner", "fields_of",
]  # fmt: skip
