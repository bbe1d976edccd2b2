"""That imports go one way, that loading a tuner needs little, and that files stay short enough to read."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the rooms that use others to those that others use
ORDER = (
    "page",
    "check",
    "integrations",
    "vision",
    "evaluation",
    "benchmark",
    "training",
    "inference",
    "adapters",
    "bases",
    "tuners",
    "kernels",
)
MODULES = {p.relative_to(ROOT).with_suffix("").as_posix(): p for p in (ROOT / "sdtune").rglob("*.py")}


def imported_modules(name: str) -> set[str]:
    """The modules of sdtune that a module imports, also inside functions."""
    package, found = name.split("/")[:-1], set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            parent = parent + (node.module.split(".") if node.module else [])
            for alias in node.names:
                path = "/".join([*parent, alias.name])
                found.add(path if path in MODULES else "/".join(parent))
        elif isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
    modules = {f if f in MODULES else f"{f}/__init__" for f in found if f.split("/")[0] == "sdtune"}
    return modules - {name, "sdtune/__init__"}


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()  # raises CycleError


def test_imports_go_from_the_rooms_that_use_others_to_those_that_are_used():
    def room(module: str) -> int | None:
        name = module.split("/")[1]
        return ORDER.index(name) if name in ORDER else None

    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported_modules(name)
        if None not in (room(name), room(other)) and room(other) < room(name)
    ]
    assert not wrong


def test_every_module_has_at_most_450_lines_and_the_readme_150():
    lengths = {
        p: len(p.read_text().splitlines()) for p in [*MODULES.values(), ROOT / "app.py", ROOT / "train_anime.py"]
    }
    assert [p for p, lines in lengths.items() if lines > 450] == []
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def run_blocking(blocked: str, code: str, **environment) -> str:
    """What code prints in a fresh process where importing any of the blocked packages fails."""
    block = f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tuners_need_torch_alone():
    code = "import torch, sdtune.tuners as t\nprint(t.ResAttn(32)(torch.randn(2, 1024, 32)).abs().sum().item())"
    blocked = "diffusers transformers peft numba llvmlite safetensors accelerate gradio huggingface_hub PIL matplotlib"
    assert float(run_blocking(blocked, code)) == 0


def test_a_tuner_file_is_read_and_written_with_torch_and_safetensors_alone(tmp_path):
    code = f"""
from sdtune.adapters import tuner_file
file = tuner_file.load("assets/anime_res_attn.safetensors")
copy = tuner_file.load(tuner_file.save({str(tmp_path / "copy.safetensors")!r}, file))
print(all(copy.tensors[k].equal(t) for k, t in file.tensors.items()), len(copy.tensors) > 0)
"""
    blocked = "diffusers transformers peft numba llvmlite accelerate gradio huggingface_hub PIL matplotlib"
    assert run_blocking(blocked, code).split() == ["True", "True"]


CODE = """
import sys, torch, sdtune
pipe = sdtune.load_base("tiny-sd")
pipe.unet.to(torch.{})
x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
text = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1)).to(x)
found = []
for file in {!r}:
    sdtune.load_tuner(pipe, file, adapter_name="anime")
    result = pipe.unet(x, 500, text).sample
    result.square().mean().backward()
    tuner = [p for name, p in pipe.unet.named_parameters() if "res_tuner" in name]
    found.append([result.detach(), torch.cat([p.grad.flatten() for p in tuner])])
    sdtune.unload_tuner(pipe, "anime")
torch.save(found, {!r})
print("numba" in sys.modules)
"""


@pytest.fixture(scope="module")
def computed(files, tmp_path_factory) -> dict[str, list]:
    """What the UNet predicts with two tuners, and their gradients, in double, with the kernels on and off."""
    import torch

    tuners, found = [str(files / "two.safetensors"), str(ROOT / "assets/anime_res_attn.safetensors")], {}
    for name, setting, dtype in (("on", "on", "float32"), ("off", "off", "float32"), ("exact", "off", "float64")):
        path = tmp_path_factory.mktemp("computed") / "found.pt"
        printed = run_blocking("", CODE.format(dtype, tuners, str(path)), SDTUNE_KERNELS=setting)
        assert printed.split()[-1] == str(setting == "on")
        found[name] = [[tensor.double() for tensor in pair] for pair in torch.load(path)]
    return found


def test_without_the_kernels_the_unet_computes_the_same_but_for_rounding(computed):
    for on, off in zip(computed["on"][0], computed["off"][0]):
        assert not on.equal(off)  # else the kernels were not used
        assert (on - off).norm() < 1e-4 * off.norm()


def test_with_the_kernels_the_bundled_tuner_is_computed_as_exactly_as_without(computed):
    """PyTorch's own gradient in fp32 is 4e-4 from that in fp64 for this tuner, which is within the attention."""
    on, off, true = (computed[name][1] for name in ("on", "off", "exact"))
    assert (on[0] - off[0]).norm() < 1e-4 * off[0].norm()
    for fast, plain, exact in zip(on, off, true):
        assert not fast.equal(plain)
        assert (fast - exact).norm() < (plain - exact).norm() + 1e-4 * exact.norm()


def test_a_wrong_setting_of_the_kernels_is_refused(monkeypatch):
    from sdtune import kernels

    monkeypatch.setenv("SDTUNE_KERNELS", "no")
    with pytest.raises(ValueError, match="SDTUNE_KERNELS is 'no'; it must be on or off"):
        kernels.is_enabled()
