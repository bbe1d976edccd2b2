"""Paths that a user has given, which may be of any text."""

from pathlib import Path


def find(text: str | Path) -> Path | None:
    """The file or folder at a path, with ~ expanded; None if there is none, or if the text can be no path."""
    try:
        path = Path(text).expanduser()
        return path if str(text).strip() and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, a ~user that does not exist, a NUL
        return None


def expand(text: str | Path) -> Path:
    """The path with ~ expanded, as a shell does where it sees one; as it is where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def show(text: str | Path) -> str:
    """A path for a message: shortened, and in quotation marks if it is empty or holds what cannot be shown."""
    text = str(text)
    short = text if len(text) <= 300 else f"{text[:200]}... ({len(text):,} characters)"
    return short if text.strip() and text.isprintable() else repr(short)
