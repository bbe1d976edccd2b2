"""The error of a base that cannot be loaded, and its sentences."""

from pathlib import Path

EXPECTED_BASE = "expected a Stable Diffusion 1.x or 2.x"


class BaseError(ValueError):
    """A base that cannot be loaded; the message names it, what was found, what was expected and what to do."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def not_text_to_image(path: Path, channels: int) -> BaseError:
    return BaseError(
        f"the UNet of {path} reads {channels} channels, as inpainting and other editing bases do; {EXPECTED_BASE} that "
        "makes images from text, with 4; choose another base"
    )
