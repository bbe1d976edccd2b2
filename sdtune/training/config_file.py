"""Settings from a file, `--config run.yaml` or the config.json of a run, and from the tuner of `--init`.

Both become flags before those of the command line. So the names are those of the flags, the command line wins, and
every value is checked as a flag is.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from ..adapters import tuner_file
from ..tuners.config import TunerConfig
from .config import TrainConfig

SECTIONS = ("train", "tuner")  # of the config.json that a run writes
NOT_SETTINGS = ("versions", "processes", "resolved")  # what else is in it


def expand_arguments(arguments: list[str]) -> list[str]:
    """The arguments of the command line, without --config, behind those of the files that they name.

    Raises:
        ValueError: if a file cannot be read, or a setting in it is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    given, rest = parser.parse_known_args(arguments)
    if given.config:
        rest = as_flags(read_settings(Path(given.config))) + rest
    parser.add_argument("--init")
    init = parser.parse_known_args(rest)[0].init
    if init:
        rest = as_flags(dataclasses.asdict(tuner_file.load(init).config)) + rest
    return rest


def read_settings(path: Path) -> dict:
    """The settings in a YAML or JSON file, by the names of the flags.

    Raises:
        ValueError: if the file cannot be read, or a name is unknown.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves all values but null as they are written: YAML would read `no` as false, and 007 as 7."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in found if tag.endswith(":null")]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            if double := sorted({name for name in names if names.count(name) > 1}):
                raise yaml.YAMLError(f"{', '.join(double)} stands in it twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path} cannot be read: {reason}; expected settings in YAML or JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds {type(content).__name__}; expected names of flags and their values")
    settings = {k: v for k, v in content.items() if k not in (*SECTIONS, *NOT_SETTINGS)}
    for section in SECTIONS:
        if isinstance(content.get(section), dict):
            settings |= {k: v for k, v in content[section].items() if k not in NOT_SETTINGS}
    known = [field.name for part in (TrainConfig, TunerConfig) for field in dataclasses.fields(part)]
    if unknown := [str(name) for name in settings if name not in known]:
        raise ValueError(
            f"--config {path} holds settings that do not exist: {', '.join(unknown)}; --help lists them all"
        )
    return settings


def as_flags(settings: dict) -> list[str]:
    """Settings as words of a command line; those that are null or an empty list are at their defaults."""
    words = []
    for name, value in settings.items():
        if isinstance(value, list):
            # argparse would read a word that begins with a dash as a flag; `TrainConfig` takes the blank away again
            words += [f"--{name}", *(f" {v}" if str(v).startswith("-") else str(v) for v in value)] if value else []
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words
