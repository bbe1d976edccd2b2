"""The samplers that the page offers, each a diffusers scheduler with its options."""

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

_PLAIN = {"use_karras_sigmas": False}  # whatever the base's own scheduler has

SAMPLERS = {
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "DDIM": (DDIMScheduler, {}),
    "Euler": (EulerDiscreteScheduler, _PLAIN),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, _PLAIN),
    "DPM++ 2M": (DPMSolverMultistepScheduler, _PLAIN),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "UniPC": (UniPCMultistepScheduler, _PLAIN),
}


def sampler_of(scheduler) -> str:
    """The name of the sampler of a pipeline's scheduler, or DDIM if the page does not offer that one."""
    return next((name for name, (kind, _) in SAMPLERS.items() if kind is type(scheduler)), "DDIM")
