"""The precision of a run when the user has chosen none."""

from types import SimpleNamespace

import pytest

from sdtune.training import accelerator, launch


@pytest.mark.parametrize("environment, command, config, chosen", [
    ({}, None, False, False),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, None, False, True),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch train_anime.py", False, False),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python -m accelerate.commands.launch train_anime.py", False, False),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch --mixed_precision=no x.py", False, True),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch --config-file a.yaml x.py", False, True),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch train_anime.py", True, True),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "python accelerate launch train_anime.py", False, True),
])  # fmt: skip
def test_a_precision_counts_as_chosen_only_if_the_user_chose_it(
    environment, command, config, chosen, monkeypatch, tmp_path
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parent = SimpleNamespace(cmdline=lambda: (command or "bash").split())
    monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    file = tmp_path / "default_config.yaml"
    file.touch() if config else None
    monkeypatch.setattr(accelerator, "default_config_file", str(file))
    assert accelerator.is_precision_chosen() is chosen
