"""The number of processes that `accelerate launch` was asked for."""

from types import SimpleNamespace

import pytest

from sdtune.training import launch


@pytest.mark.parametrize("command, count", [
    ("bash", 1),
    ("python accelerate launch train_anime.py", 1),
    ("python accelerate launch --num_processes 3 train_anime.py --num_processes 5", 3),
    ("python accelerate launch --cpu --num-processes=2 -m other_module", 1),
])  # fmt: skip
def test_num_processes_of_the_launcher_is_read_before_the_script_name(command, count, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    parent = SimpleNamespace(cmdline=lambda: command.split())
    monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert launch.requested_processes("train_anime.py") == count
