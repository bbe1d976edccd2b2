"""Pushing a run to the hub, against a stand-in of its API on this machine, over real HTTP."""

import base64
import copy
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from peft import PeftModel
from PIL import Image
from training_runs import short_run

import sdtune

PUSH = "import sys, sdtune; print(sdtune.push_to_hub(sys.argv[1], 'ann/style', token='hf_test'))"


@pytest.fixture
def writable_hub(tmp_path):
    """A hub to which files can be pushed: its address, and a folder with what was committed."""
    store = tmp_path / "hub"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self.read_chunks()
            address = f"http://127.0.0.1:{self.server.server_port}"
            if self.path.startswith("/api/repos/create"):
                answer = {"url": f"{address}/ann/style", "id": "ann/style", "name": "ann/style"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        path = store / entry["value"]["path"]
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(base64.b64decode(entry["value"]["content"]))
                answer = {"success": True, "commitOid": "a" * 40, "commitUrl": f"{address}/ann/style/commit/{'a' * 40}"}
            else:
                answer = {}
            self.answer(json.dumps(answer).encode())

        def read_chunks(self):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        def do_GET(self):
            path = self.path.partition("?")[0]
            name = path.removeprefix("/ann/style/resolve/main/")
            if name != path and (store / name).is_file():
                self.answer((store / name).read_bytes(), "application/octet-stream")
            elif path.startswith("/api/models/ann/style"):
                siblings = [{"rfilename": p.relative_to(store).as_posix()} for p in store.rglob("*") if p.is_file()]
                self.answer(json.dumps({"id": "ann/style", "sha": "a" * 40, "siblings": siblings}).encode())
            else:
                self.answer(b"{}", status=404)

        do_HEAD = do_GET

        def answer(self, body, kind="application/json", status=200):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{abs(hash(body))}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", store
        server.shutdown()


def run(code: str, address: str, home, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kind", ["res_attn", "lora"])
def test_a_run_is_pushed_with_a_model_card_and_loads_by_its_id(base, pairs, tmp_path, monkeypatch, writable_hub, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    address, store = writable_hub
    config = short_run(pairs, tmp_path, trigger_words="drawn by ann", author="Ann", license="cc-by-4.0")
    ops = ["attn1", "attn2"] if kind == "lora" else ["attn1", "ff"]
    result = sdtune.fit(config, sdtune.TunerConfig(kind=kind, ops=ops))
    load = "p = sdtune.load_base('tiny-sd'); print(sdtune.load_tuner(p, 'ann/style'))"
    done = run(f"{PUSH}; {load}", address, tmp_path / "home", "~/run")
    assert done.returncode == 0, done.stderr
    weights = "pytorch_lora_weights.safetensors" if kind == "lora" else "tuner.safetensors"
    assert (store / weights).read_bytes() == result.tuner.read_bytes()
    assert {"README.md", "config.json", "loss.png", "images"} <= {p.name for p in store.iterdir()}
    from huggingface_hub import ModelCard

    card = ModelCard.load(store / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert data["license"] == "cc-by-4.0"
    assert data["instance_prompt"] == "drawn by ann" and data["widget"][0]["text"] == "a girl with blue hair"
    assert Image.open(store / data["widget"][0]["output"]["url"]).size == (64, 64)
    assert "![the preview prompts](images/0.png)" in card.text and (store / "images/0.png").is_file()
    assert ("lora" in data["tags"]) == (kind == "lora") and "sdtune" in data["tags"]
    assert "Made by Ann." in card.text
    assert "0, the base" in card.text and 'load_tuner(pipe, "ann/style")' in card.text

    unet, plain = copy.deepcopy(base.unet), copy.deepcopy(base.unet)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)
    sdtune.load_tuner(plain, store)
    with torch.no_grad():
        expected = plain(x, 500, text).sample
        assert torch.equal(PeftModel.from_pretrained(unet, store)(x, 500, text).sample, expected)
    if kind == "lora":
        pipe = copy.deepcopy(base)
        pipe.load_lora_weights(store)  # finds the file by its name, beside PEFT's
        with torch.no_grad():
            assert torch.equal(pipe.unet(x, 500, text).sample, expected)


def test_a_failed_push_after_training_loses_nothing_and_says_how_to_push_again(pairs, tmp_path):
    config = short_run(pairs, tmp_path, steps=1, push_to_hub="ann/style")
    code = f"import sdtune; sdtune.fit(sdtune.TrainConfig(**{vars(config)!r}))"
    done = run(code, "http://127.0.0.1:9", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/tuner.safetensors").is_file()
    assert "the run was not pushed to ann/style" in done.stdout and "sdtune.push_to_hub(" in done.stdout
