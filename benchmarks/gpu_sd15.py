"""Step time and peak memory of full-size Stable Diffusion 1.5 LoRA training at 512 px, with random weights.

    python benchmarks/gpu_sd15.py [--batch 1] [--steps 30]

Needs an NVIDIA GPU; says so and ends with 0 without one. Weights are drawn from N(0, 0.02), since zeros run faster and
values do not matter otherwise. 10 warm-up steps, then each step timed with GPU events. Prints JSON. `--smoke` runs the
same code over a tiny model on the CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from facts import facts, percentile

WARM_UP = 10


def write_random_sd15(folder: Path, device: Any) -> Path:
    """Write a Stable Diffusion 1.5 of full size in fp16, every weight from N(0, 0.02), with the demo's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lorasmith.presets.demo.tokenizer import build_tokenizer

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    with torch.no_grad():
        for part in (unet, text, vae):
            for weight in part.parameters():
                weight.normal_(0.0, 0.02)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    tokenizer = build_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae.half(), text.half(), tokenizer, unet.half(), scheduler, None, None, requires_safety_checker=False
    )
    pipeline.to("cpu").save_pretrained(folder)
    return folder


def measure(base: Path, device: Any, resolution: int, batch: int, steps: int) -> dict[str, Any]:
    """Train `steps` steps and return their times and the memory they took."""
    import torch
    from training_parts import build, load_family, settings

    gpu = device.type != "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    family = load_family(str(base), device, dtype)
    config = settings(str(base), resolution, batch, {"rank": 16, "alpha": 16.0}, steps=WARM_UP + steps)
    learner, _ = build(family, config)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM_UP):
        learner.run_step(step)
    times = [timed_step(learner, WARM_UP + step, gpu) for step in range(steps)]
    result: dict[str, Any] = {
        "step_ms_median": round(median(times), 2),
        "step_ms_p90": round(percentile(times, 90), 2),
        "batch": batch,
        "resolution": resolution,
        "precision": str(dtype).removeprefix("torch."),
        "rank": 16,
        "steps": steps,
        "weights_millions": round(sum(p.numel() for p in family.denoiser.parameters()) / 1e6, 1),
    }
    if gpu:
        result |= {
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        }
    return result


def timed_step(learner: Any, step: int, gpu: bool) -> float:
    """Return the milliseconds of one step, by events on the GPU or by the clock."""
    import torch

    if not gpu:
        started = time.perf_counter()
        learner.run_step(step)
        return 1000 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    learner.run_step(step)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU instead")
    options = parser.parse_args()
    import torch

    from lorasmith.engine.run_log import quiet_libraries

    quiet_libraries()
    if not (torch.cuda.is_available() or options.smoke):
        skipped = {"benchmark": "gpu_sd15", "skipped": "no NVIDIA GPU that torch can use"}
        print(json.dumps(skipped | facts("torch"), indent=2))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        if options.smoke:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            from tests.tiny import build_tiny_sd15

            result: dict[str, Any] = {"smoke": True}
            result |= measure(build_tiny_sd15(base), torch.device("cpu"), 64, options.batch, options.steps)
        else:
            device = torch.device("cuda", 0)
            result = {"gpu": torch.cuda.get_device_name(device)}
            result |= measure(write_random_sd15(base, device), device, 512, options.batch, options.steps)
    print(json.dumps({"benchmark": "gpu_sd15"} | result | facts("torch", "diffusers", "peft"), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
