"""What works with the core alone, and that a missing extra is named in one line with the command of pip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdtune import extras

ROOT = Path(__file__).parent.parent
EXTRAS = sorted({name for names in extras.PACKAGES.values() for name in names})


def run_without_extras(code: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh process in which no package of an extra can be imported."""
    block = f"import sys\nfor name in {EXTRAS!r}: sys.modules[name] = None\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", block + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_the_core_loads_a_tuner_and_draws():
    done = run_without_extras("""
import sdtune
pipe = sdtune.load_base("tiny-sd")
name = sdtune.load_tuner(pipe, "assets/anime_res_attn.safetensors")
print(pipe("a girl", num_inference_steps=1, output_type="latent").images.shape)
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script, extra", [("train_anime.py", "train"), ("app.py", "page"), ("sdtune/evaluation/__main__.py", "train")]
)
def test_a_missing_extra_is_named_in_one_line(script, extra):
    module = {"sdtune/evaluation/__main__.py": "sdtune.evaluation"}.get(script)
    how = f"run_module({module!r}" if module else f"run_path({script!r}"
    stay = (
        "import os; os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.tcache_count=0'\n"  # else the script restarts itself
    )
    done = run_without_extras(f"{stay}import runpy; sys.argv = [{script!r}]; runpy.{how}, run_name='__main__')")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith(f"install with: pip install 'sdtune[{extra}]'")


@pytest.mark.parametrize(
    "code, extra",
    [("import sdtune; sdtune.fit(sdtune.TrainConfig())", "train"),
     ("from sdtune.evaluation.features import feature_network; feature_network()", "evaluate")],
)  # fmt: skip
def test_python_code_that_needs_an_extra_says_so_before_it_does_anything(code, extra):
    done = run_without_extras(code)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("sdtune.extras.MissingPackages: ")
    assert done.stderr.strip().endswith(f"not installed; install with: pip install 'sdtune[{extra}]'")


def test_the_lists_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def names(extra: str) -> set[str]:
        plain = {item.split(">")[0] for item in declared[extra]}
        nested = [name for name in plain if name.startswith("sdtune[")]
        return (plain - set(nested)).union(*(names(n[len("sdtune[") : -1]) for n in nested))

    for extra, packages in extras.PACKAGES.items():
        assert names(extra) == set(packages)
