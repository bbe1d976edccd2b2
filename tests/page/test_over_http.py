"""What somebody else on the network can do with the page: requests to the real server, past the browser."""

import html
import http.client
import json
import os
import pickle
import secrets
import shutil
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict

import pytest
from PIL import Image

from sdtune import extras
from sdtune.page import layout, output_folder


class Attacker:
    """A client of the server's own requests, which can send any value to any event of the page."""

    def __init__(self, address: str):
        self.address, self.session = address, secrets.token_hex(5)
        self.config = json.loads(self.get("/config"))
        self.by_id = {c["id"]: c["props"] for c in self.config["components"]}

    def get(self, path: str) -> bytes:
        return urllib.request.urlopen(self.address + path, timeout=60).read()

    def post(self, path: str, content: bytes, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(self.address + path, content, {"Content-Type": kind})
        return urllib.request.urlopen(request, timeout=60).read()

    def upload(self, name: str, content: bytes) -> str:
        """Uploads a file under a name that is sent as it is; gives the path that the server answers."""
        head = f'--X\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + content + b"\r\n--X--\r\n"
        return json.loads(self.post("/gradio_api/upload", body, "multipart/form-data; boundary=X"))[0]

    def call(self, elem_id: str, event: str, values: dict | None = None) -> str:
        """Sends an event of a component; gives all that the server answers until it has ended, as text.

        Args:
            values: of the inputs, by their elem_id or label; the others have what the page shows at first.
        """
        target = next(i for i, props in self.by_id.items() if props.get("elem_id") == elem_id)
        found = next(d for d in self.config["dependencies"] if [target, event] in d["targets"])
        data = []
        for i in found["inputs"]:
            props = self.by_id[i]
            names = [n for n in (props.get("elem_id"), props.get("label")) if n in (values or {})]
            hidden_captions = props.get("visible") is False and "lines" in props
            data.append(values[names[0]] if names else "[]" if hidden_captions else props.get("value"))
        body = {"data": data, "fn_index": found["id"], "session_hash": self.session}
        self.post("/gradio_api/queue/join", json.dumps(body).encode())
        answer = []
        with urllib.request.urlopen(
            f"{self.address}/gradio_api/queue/data?session_hash={self.session}", timeout=60
        ) as stream:
            for line in stream:
                answer.append(line.decode())
                if "process_completed" in answer[-1] or "unexpected_error" in answer[-1]:
                    break
        return "".join(answer)


def as_file(path: str) -> dict:
    return {"path": path, "orig_name": os.path.basename(path), "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def attacker(backend, tmp_path):
    (tmp_path / "secret.txt").write_text("a secret")
    run = backend.output.path / "mine"
    run.mkdir()
    (run / "tuner.safetensors").write_bytes(b"somebody's result")
    page, (address, *_) = layout.launch(backend, "127.0.0.1", None)
    yield Attacker(address.rstrip("/"))
    page.close(verbose=False)


def all_files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_file_outside_the_folder_of_images_is_handed_out_however_its_path_is_written(attacker, backend, tmp_path):
    images = backend.output.images
    images.mkdir(parents=True, exist_ok=True)
    (images / "link").symlink_to(tmp_path)
    secret = tmp_path / "secret.txt"
    paths = [
        "/etc/passwd", secret, backend.output.path / "mine/tuner.safetensors", images / "../../../secret.txt",
        f"{images}/..%2f..%2f..%2fsecret.txt", f"{images}/%2e%2e/%2e%2e/%2e%2e/secret.txt",
        f"/{secret}", f"{secret}%00.png",
        images / "link/secret.txt", f"file://{secret}", f"{images}/..%252f..%252f..%252fsecret.txt",
    ]  # fmt: skip
    for path in paths:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
            try:
                content = attacker.get(route + str(path).replace(" ", "%20"))
            except (urllib.error.HTTPError, http.client.InvalidURL):
                continue
            assert b"secret" not in content and b"root:" not in content and b"result" not in content, path


def test_a_path_of_the_server_is_no_upload(attacker, backend, tmp_path):
    secret = str(tmp_path / "secret.txt")
    result = str(backend.output.path / "mine" / "tuner.safetensors")
    before = all_files(backend.output.path)
    for elem_id, event, path in (
        ("train-files", "change", secret), ("train-files", "change", "/etc/passwd"), ("add-file", "upload", result),
        ("add-file", "upload", f"{backend.output.path}/uploads/../mine/tuner.safetensors"),
        ("restore", "upload", secret),
    ):  # fmt: skip
        value = [as_file(path)] if elem_id == "train-files" else as_file(path)
        answer = attacker.call(elem_id, event, {elem_id: value})
        assert "a secret" not in answer and "root:" not in answer and "Added" not in answer, answer
    assert all_files(backend.output.path) == before


def test_nothing_of_others_is_overwritten_by_a_name(attacker, backend, files):
    content = (files / "one.safetensors").read_bytes(), (files / "two.safetensors").read_bytes()
    for name in ("../../../mine/tuner.safetensors", "tuner.safetensors", "..\\\\..\\\\mine\\\\tuner.safetensors"):
        for one in content:
            attacker.call("add-file", "upload", {"add-file": as_file(attacker.upload(name, one))})
    assert (backend.output.path / "mine/tuner.safetensors").read_bytes() == b"somebody's result"
    kept = [p.read_bytes() for p in (backend.output.path / "uploads").iterdir()]
    assert sorted(set(kept)) == sorted(content)  # of two uploads of one name, neither has replaced the other

    backend.may_finish.set()
    for name, folder in (
        ("mine", "mine-2"),
        ("../mine", "mine-3"),
        ("uploads", "uploads-2"),
        ("Hub", "Hub-2"),
        (".page", "page"),
    ):
        attacker.session = secrets.token_hex(5)  # a window has one training
        values = {"source": "bundled", "run-name": name}
        attacker.call("train", "click", values)
        assert (backend.output.path / folder).is_dir(), name
    assert all_files(backend.output.path / "mine") == {"tuner.safetensors": b"somebody's result"}


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_under_no_name_and_in_no_field(attacker, backend, tmp_path):
    content = pickle.dumps(Harmful(tmp_path / "it-ran"))
    header = b"\2\0\0\0\0\0\0\0{}"
    for name in ("a.safetensors", "a.pt", "a.bin", "a.ckpt", "a.pkl", "a.safetensors.pt", "a.png", "metadata.jsonl"):
        for body in (content, header + content):
            path = attacker.upload(name, body)
            for elem_id, event in (("add-file", "upload"), ("train-files", "change"), ("restore", "upload")):
                value = [as_file(path)] if elem_id == "train-files" else as_file(path)
                answer = attacker.call(elem_id, event, {elem_id: value})
                assert "Added" not in answer
    assert not (tmp_path / "it-ran").exists()
    assert not list(backend.output.path.glob("uploads/*"))
    pickle.loads(content)  # that it would have
    assert (tmp_path / "it-ran").exists()


def test_no_request_fills_the_disk(attacker, backend, monkeypatch, tmp_path):
    form = {"source": "bundled", "run-name": "big"}
    for values, message in (
        ({"train-steps": 1_000_000_000}, "at most 100,000"),
        ({"train-steps": 100_000, "Checkpoint every": 1, "Rank": 64, "Heads": 8}, "of which 1.0 GB are kept"),
        ({"train-steps": 100_000, "Preview every": 1, "Resolution": 1024}, "of which 1.0 GB are kept"),
        ({"Preview prompts": "a\n" * 1000}, "preview prompts; at most 64"),
    ):  # fmt: skip
        assert message in attacker.call("train", "click", form | values)
    assert not (backend.output.path / "big").exists() and not backend.queue.jobs()

    picture = attacker.upload("a.png", picture_bytes(tmp_path))
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**9, output_folder.RESERVE + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for elem_id, event, values in (
        ("train", "click", form), ("draw", "click", {}),
        ("draw-grid", "click", {"axis-across": "seed", "values-across": "1, 2", "axis-down": ""}),
        ("train-files", "change", {"train-files": [as_file(picture)]}),
    ):  # fmt: skip
        assert "1.0 GB are kept" in attacker.call(elem_id, event, values), elem_id
    assert not backend.queue.jobs()
    with pytest.raises(urllib.error.HTTPError) as refused:
        attacker.upload("a.png", bytes(1000))
    assert refused.value.code == 507 and b"This upload needs about" in refused.value.read()


def test_an_upload_that_says_no_length_is_refused(attacker):
    address = urllib.parse.urlparse(attacker.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    connection.request(
        "POST", "/gradio_api/upload", iter([b"--X\r\n", bytes(100)]), encode_chunked=True,
        headers={"Content-Type": "multipart/form-data; boundary=X", "Transfer-Encoding": "chunked"},
    )  # fmt: skip
    assert connection.getresponse().status == 411


def test_a_step_is_chosen_only_with_the_packages_for_it_and_images_that_were_held_out(
    attacker, backend, monkeypatch, pairs, wait_for
):
    assert "There is no training with a checkpoint here" in attacker.call("choose-step", "click")
    backend.may_finish.set()
    attacker.call("train", "click", {"source": "bundled", "run-name": "own"})
    training = wait_for(backend.trainings.shown_in(attacker.session))
    folder = backend.output.path / "own"
    (folder / "checkpoints/step-000003").mkdir(parents=True)
    settings = {**asdict(training.run.config), "data": str(pairs / "train"), "resolution": 128}
    (folder / "config.json").write_text(json.dumps({"train": {k: v for k, v in settings.items() if k != "output"}}))
    answer = attacker.call("choose-step", "click")
    assert "needs 2 or more images that were not trained on, and this training held out 0" in answer
    monkeypatch.setitem(extras.PACKAGES, "evaluate", ("no_such_package",))
    answer = attacker.call("choose-step", "click")
    assert "no_such_package not installed; install with: pip install 'sdtune[evaluate]'" in html.unescape(answer)
    assert not backend.queue.jobs()


def picture_bytes(folder) -> bytes:
    Image.effect_noise((256, 256), 50).save(folder / "noise.png")
    return (folder / "noise.png").read_bytes()
