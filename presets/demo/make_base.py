"""Train the embedded demo base model from nothing: `python -m lorasmith.presets.demo.make_base --out DIR`.

Two stages, each resumable (Ctrl-C or a kill loses at most a minute; call it again with the same folder):

1. `vae`: AutoencoderKL, 4x smaller each way, 8 latent channels, on 32-px crops of scenes with random blobs, so that it
   can also show things that the denoiser was never taught. L1 + 2 MSE + 1e-4 KL.
2. `denoiser`: UNet2DConditionModel and CLIPTextModel together, v-prediction (Salimans & Ho, arXiv:2202.00512) with zero
   terminal SNR (Lin et al., arXiv:2305.08891), on latents that are encoded once. 10 % of the captions are empty, for
   classifier-free guidance; 20 % begin with a junk word, so that a word without meaning changes nothing.

Then `judge` measures held-out prompts with the rules of `judge.py` and the folder is written in fp16. The figures of
the run that made the shipped weights are in `presets/demo/README.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from transformers import CLIPTextModel

from lorasmith.presets.demo.blueprint import build_text_encoder, build_unet, build_vae, scheduler_config
from lorasmith.presets.demo.judge import matches
from lorasmith.presets.demo.scenes import SIDE, Scene, all_scenes, draw, junk_word
from lorasmith.presets.demo.tokenizer import build_tokenizer

VARIANTS = 20
"""Encoded pictures a scene."""
HELD_OUT = 48
"""Scenes, chosen by lot, that are never drawn for the denoiser; their prompts are what `judge` asks."""
VAE_CROP = 32
SAVE_SECONDS = 60
EMA_DECAY = 0.999


def held_out_scenes() -> list[Scene]:
    """Return the scenes that the denoiser never sees."""
    return Random("held out").sample(list(all_scenes()), HELD_OUT)


def training_scenes() -> list[Scene]:
    """Return the scenes that the denoiser is trained on."""
    held_out = set(held_out_scenes())
    return [scene for scene in all_scenes() if scene not in held_out]


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Stack pictures as (B, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


# --------------------------------------------------------------------------------------------- stages, resumable


def run_stage(
    name: str,
    folder: Path,
    modules: dict[str, torch.nn.Module],
    step: Callable[[int], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    ema: dict[str, torch.Tensor] | None = None,
) -> None:
    """Call `step(k)` for k < steps, saving to `folder/NAME.pt` once a minute and at the end."""
    path = folder / f"{name}.pt"
    seconds = 0.0
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        if ema is not None:
            ema.update(state["ema"])
    started, saved = time.monotonic() - seconds, time.monotonic()
    loss = torch.zeros(())
    for k in range(first, steps):
        loss = 0.98 * loss + 0.02 * step(k) if k > first else step(k)
        if k + 1 == steps or time.monotonic() - saved > SAVE_SECONDS:
            seconds, saved = time.monotonic() - started, time.monotonic()
            state = {key: module.state_dict() for key, module in modules.items()}
            state |= {"optimizer": optimizer.state_dict(), "step": k + 1, "seconds": seconds, "ema": ema or {}}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            print(f"{name} {k + 1}/{steps}  loss {float(loss):.4f}  {seconds:.0f} s", flush=True)


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Return the learning-rate factor: linear warm-up, then half a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set one learning rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def blobby(scene: Scene, seed: int, rng: Random) -> Image.Image:
    """Draw `scene` with a few random dots, bars and patches on it."""
    picture = draw(scene, seed)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 8)):
        x, y, width, height = rng.uniform(0, 60), rng.uniform(0, 60), rng.uniform(2, 16), rng.uniform(2, 16)
        shade = rng.choice([(250, 250, 250), (8, 8, 8), tuple(rng.randint(0, 255) for _ in range(3))])
        kind = rng.choice([pen.ellipse, pen.rectangle])
        kind([x, y, x + width, y + height], fill=shade)
    return picture


def train_vae(folder: Path, steps: int) -> AutoencoderKL:
    """Train the autoencoder and return it with its latents scaled to unit variance."""
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4)
    scenes = list(all_scenes())

    def step(k: int) -> torch.Tensor:
        rng = Random(f"vae/{k}")
        crops = []
        for i in range(16):
            picture = blobby(rng.choice(scenes), k * 16 + i, rng)
            x, y = rng.randint(0, SIDE - VAE_CROP), rng.randint(0, SIDE - VAE_CROP)
            crops.append(picture.crop((x, y, x + VAE_CROP, y + VAE_CROP)))
        pixels = to_tensor(crops).to(memory_format=torch.channels_last)
        set_lr(optimizer, 3e-3 * cosine(k, steps))
        torch.manual_seed(k)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss: torch.Tensor = (
            F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + 1e-4 * posterior.kl().mean() / 64
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    run_stage("vae", folder, {"vae": vae}, step, optimizer, steps)
    vae.eval().requires_grad_(False)
    return vae


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, pictures: list[Image.Image]) -> float:
    """Return the reconstruction quality over `pictures` in dB."""
    pixels = to_tensor(pictures)
    error = F.mse_loss(vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1), pixels)
    return float(10 * torch.log10(4 / error))


@torch.no_grad()
def latent_bank(folder: Path, vae: AutoencoderKL) -> torch.Tensor:
    """Return the encoded pictures of every training scene, (scenes, VARIANTS, 8, 16, 16) in fp16, scaled."""
    path = folder / "latents.pt"
    bank: torch.Tensor
    if path.exists():
        bank, factor = torch.load(path, weights_only=True)
    else:
        rows = []
        for scene in training_scenes():
            pictures = [draw(scene, seed) for seed in range(VARIANTS)]
            rows.append(vae.encode(to_tensor(pictures)).latent_dist.mode())
        bank = torch.stack(rows)
        factor = float(1 / bank.std())
        bank = (bank * factor).half()
        torch.save((bank, factor), path)
    vae.register_to_config(scaling_factor=factor)
    return bank


def batch_of(k: int, size: int, bank: torch.Tensor, scenes: list[Scene]) -> tuple[torch.Tensor, list[str]]:
    """Return the latents and captions of step `k`, a function of `k` alone."""
    rng = Random(f"denoiser/{k}")
    chosen = [(rng.randrange(len(scenes)), rng.randrange(VARIANTS)) for _ in range(size)]
    captions = []
    for index, _ in chosen:
        caption = scenes[index].caption(rng)
        if rng.random() < 0.20:
            caption = f"{junk_word(rng)}, {caption}"
        captions.append("" if rng.random() < 0.10 else caption)
    return torch.stack([bank[i, j] for i, j in chosen]).float(), captions


def train_denoiser(
    folder: Path, bank: torch.Tensor, steps: int, batch: int, lr: float
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train denoiser and text encoder together and return their moving averages."""
    torch.manual_seed(0)
    unet, text_encoder, tokenizer = build_unet(), build_text_encoder(), build_tokenizer()
    # Matrix units of recent CPUs make bf16 1.4x faster here, but not in the backward pass of fused attention.
    unet.set_attn_processor(AttnProcessor())
    noise_schedule = DDPMScheduler.from_config(scheduler_config())
    modules: dict[str, torch.nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    named = {f"{key}.{name}": p for key, module in modules.items() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(named.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = {name: p.detach().clone() for name, p in named.items()}
    scenes = training_scenes()

    def step(k: int) -> torch.Tensor:
        latents, captions = batch_of(k, batch, bank, scenes)
        generator = torch.Generator().manual_seed(k)
        noise = torch.randn(latents.shape, generator=generator)
        # More of the steps at high noise: shape and place are decided there.
        timesteps = (1000 * torch.rand(batch, generator=generator) ** 0.5).long().clamp(max=999)
        noisy = noise_schedule.add_noise(latents, noise, timesteps)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(noisy, timesteps, text_encoder(tokens)[0]).sample
        loss = F.mse_loss(prediction.float(), noise_schedule.get_velocity(latents, noise, timesteps))
        set_lr(optimizer, lr * cosine(k, steps))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + k) / (10 + k))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in named.values()], 1 - decay)
        return loss.detach()

    run_stage("denoiser", folder, modules, step, optimizer, steps, ema)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(ema[name])
    return unet.eval(), text_encoder.eval()


def write_base(folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL) -> None:
    """Write the diffusers folder in fp16."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler.from_config(scheduler_config() | {"set_alpha_to_one": True}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def judge_base(folder: Path, seeds: int = 4, guidance: float = 3.0, steps: int = 20) -> dict[str, float]:
    """Return, for the held-out prompts, the share of pictures whose shape, colour and background are right."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    scenes = held_out_scenes()
    right = {"shape": 0, "color": 0, "background": 0}
    sheet: list[Image.Image] = []
    for seed in range(seeds):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(scenes))]
        prompts = [scene.caption() for scene in scenes]
        pictures = pipeline(prompts, generator=generators, guidance_scale=guidance, num_inference_steps=steps).images
        sheet += pictures
        for picture, scene in zip(pictures, scenes, strict=True):
            for name, ok in matches(picture, scene).items():
                right[name] += ok
    grid = Image.new("RGB", (SIDE * len(scenes) // 3, SIDE * 3 * seeds))
    for index, picture in enumerate(sheet):
        row, column = divmod(index, len(scenes) // 3)
        grid.paste(picture, (column * SIDE, row * SIDE))
    grid.save(folder.parent / "judged.png")
    return {name: count / (seeds * len(scenes)) for name, count in right.items()}


def main() -> None:
    """Train, write and judge the base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work folder; the model is written to OUT/base")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judge-only", action="store_true", help="write and judge what has been trained so far")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    vae = train_vae(arguments.out, 0 if arguments.judge_only else arguments.vae_steps)
    sample = [draw(scene, 999, concept=True) for scene in held_out_scenes()]
    figures: dict[str, Any] = {"vae_psnr_db": vae_psnr(vae, sample)}
    print(figures, flush=True)
    bank = latent_bank(arguments.out, vae)
    steps = 0 if arguments.judge_only else arguments.steps
    unet, text_encoder = train_denoiser(arguments.out, bank, steps, arguments.batch, arguments.lr)
    write_base(arguments.out / "base", unet, text_encoder, vae)
    figures |= judge_base(arguments.out / "base")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
