"""The restart of a command with its own heap settings."""

import os
import subprocess
import sys

from sdtune.kernels.cpu.heap import heap_environment


def test_a_command_restarts_once_with_heap_settings_and_keeps_its_arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom sdtune.kernels.cpu import heap\nheap.restart_with_heap_settings()\n"
        "print(os.environ.get('GLIBC_TUNABLES'), heap.heap_environment(), sys.argv[1:], sys.flags.utf8_mode)"
    )
    command = [sys.executable, "-X", "utf8", str(script), "two words", "--flag"]
    path = os.pathsep.join(p for p in sys.path if p)
    output = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path}, text=True)
    assert output.strip() == f"{heap_environment().get('GLIBC_TUNABLES')} {{}} ['two words', '--flag'] 1"
