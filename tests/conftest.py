"""What tests share: the real small base, tuner and LoRA files for it, and a few real pairs."""

import copy
import http.server
import json
import os
import shutil
import signal
import threading
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, because threads that wait for each other spin
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

import sdtune
from sdtune.adapters import inject
from sdtune.bases import single_file
from sdtune.bases.properties import get_unet
from sdtune.inference import plots
from sdtune.training import dataset
from sdtune.training.buckets import AspectBuckets
from sdtune.training.previews import Previews

ANIME = Path(__file__).parent.parent / "assets" / "anime"


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes and nohup ignore these
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not any("test_cuda" in argument for argument in config.args):  # test_cuda.py has the GPU for itself
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the others compare what a CPU computes, often bit for bit


def stir(pipe, name: str, seed: int, size: float = 0.05) -> None:
    """Gives a fresh tuner weights that show."""
    generator = torch.Generator().manual_seed(seed)
    for key, p in inject.adapter_parameters(get_unet(pipe), name).items():
        if ".o." in key:
            p.data += size * torch.randn(p.shape, generator=generator).to(p)


def picture(pipe, **kwargs) -> torch.Tensor:
    """What a pipeline draws, at 128 px, in two steps, before the VAE rounds it."""
    options = dict(num_inference_steps=2, guidance_scale=3.0, height=128, width=128, output_type="latent")
    return pipe("a cat face", generator=torch.Generator().manual_seed(0), **{**options, **kwargs}).images


@pytest.fixture(scope="session")
def base() -> StableDiffusionPipeline:
    """The small base, for reading only."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return sdtune.load_base("tiny-sd")


@pytest.fixture
def pipe(base) -> StableDiffusionPipeline:
    """The small base, to change."""
    return copy.deepcopy(base)


@pytest.fixture
def unet(base) -> UNet2DConditionModel:
    """The small base's UNet, to change."""
    return copy.deepcopy(base.unet)


@pytest.fixture(scope="session")
def sd15_unet() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5, from its public configuration, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(single_file.CONFIGS / "sd15/unet"))


@pytest.fixture(scope="session")
def files(base, tmp_path_factory) -> Path:
    """A folder with two tuners, and a LoRA of UNet and text encoder as diffusers saves it, all for the small base."""
    folder = tmp_path_factory.mktemp("files")
    for seed, (name, ops) in enumerate({"one": ["attn1", "attn2", "ff"], "two": ["attn1", "ff"]}.items()):
        pipe = copy.deepcopy(base)
        sdtune.add_tuner(pipe, sdtune.TunerConfig(ops=ops), name)
        stir(pipe, name, seed)
        sdtune.save_tuner(pipe, folder / f"{name}.safetensors", name)
    pipe, layers = copy.deepcopy(base), {}
    torch.manual_seed(3)
    for part, model, targets in (
        ("unet", pipe.unet, ["to_q", "to_k", "to_v", "to_out.0"]),
        ("text_encoder", pipe.text_encoder, ["q_proj", "v_proj"]),
    ):
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(folder / "lora", **layers)
    return folder


@pytest.fixture(scope="session")
def made_pairs(tmp_path_factory) -> Path:
    """What `pairs` is a copy of."""
    folder = tmp_path_factory.mktemp("made-pairs")
    for split, count in (("train", 5), ("test", 2)):
        (folder / split).mkdir()
        for i, pair in enumerate(dataset.read_pairs(ANIME, AspectBuckets(128), split)[:count]):
            pair.open().resize((128, 128), Image.Resampling.LANCZOS).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text(pair.caption)
    return folder


@pytest.fixture
def pairs(made_pairs, tmp_path_factory) -> Path:
    """Five of the anime pairs and two held-out ones at 128 px with .txt captions, in folders train and test."""
    return shutil.copytree(made_pairs, tmp_path_factory.mktemp("pairs"), dirs_exist_ok=True)


@pytest.fixture
def without_final_check(monkeypatch):
    """Runs end without the plot of their losses and the check of their file, for tests of what comes before."""
    monkeypatch.setattr(Previews, "verify_file", lambda *_: 0.0)
    monkeypatch.setattr(plots, "plot_losses", lambda *_: None)


@pytest.fixture
def hub(files):
    """A hub on this machine; its address. ann/style and ann/style-v1.5 hold the tuner two and a preview of it."""
    parts = {"tuner.safetensors": (files / "two.safetensors").read_bytes(),
             "preview.png": (ANIME / "train/train-01.png").read_bytes()}  # fmt: skip
    answers = {}
    for name in ("ann/style", "ann/style-v1.5"):
        siblings = [{"rfilename": file, "size": len(content)} for file, content in parts.items()]
        answers[f"/api/models/{name}"] = json.dumps({"id": name, "siblings": siblings}).encode()
        answers |= {f"/{name}/resolve/main/{file}": content for file, content in parts.items()}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            body = answers.get(path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "application/json" if "/api/" in path else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{abs(hash(path))}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hub.server_port}"
        hub.shutdown()
