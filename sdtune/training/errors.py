"""The errors of data sets and of training runs, and how their messages show file names."""


class DataError(ValueError):
    """A data set that cannot be used; `problems` lists every one found, each on one line and naming its file."""

    def __init__(self, where, problems: list[str]):
        self.problems = [printable(p) for p in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{printable(str(where))}: {count}\n" + "\n".join(f"  - {p}" for p in self.problems))


def shorten_list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def printable(text: str) -> str:
    # File names and metadata may hold newlines, terminal codes and bytes that no terminal can print.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TrainError(RuntimeError):
    """A run that cannot start or go on; the message says what was found and what to do."""


class Stopped(TrainError):
    """A run that a signal ended after writing a checkpoint. `signum` is the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
