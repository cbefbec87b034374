"""Step time and peak memory of full-size Stable Diffusion 1.5 LoRA training at 512 px, with random weights.

    python benchmarks/gpu_sd15.py [--batch 1] [--steps 30] [--deterministic] [--workers 0]

Needs an NVIDIA GPU; says so and ends with 0 without one. Weights are drawn from N(0, 0.02), since zeros run faster and
values do not matter otherwise. 10 warm-up steps, then each step timed with GPU events. Prints JSON. `--deterministic`
measures the same with kernels that give the same bits each time, in a process of its own, since cuBLAS is set up once:
run it beside one without, and the ratio of the medians is the cost of train.deterministic. Then the steps are done
twice, and `same_bits` tells whether the LoRA is the same. `--smoke` runs the same code over a tiny model on the CPU, to
see that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: pixels, pictures a step, steps, and more settings of `train`."""

    resolution: int
    batch: int
    steps: int
    train: dict[str, Any]


def measure(base: Path, device: Any, case: Case) -> dict[str, Any]:
    """Train, and return the times of the steps and the memory they took; repeatable kernels are proved by a repeat."""
    import torch

    from lorasmith.engine.compute import deterministic_kernels

    with deterministic_kernels(case.train["deterministic"], print):
        result, weights = measure_steps(base, device, case)
        if case.train["deterministic"]:
            _, again = measure_steps(base, device, case)
            result["same_bits"] = all(torch.equal(weights[key], again[key]) for key in weights)
    return result


def measure_steps(base: Path, device: Any, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures of one training and the LoRA that it made."""
    import torch
    from training_parts import build, load_family, settings

    gpu = device.type != "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    family = load_family(str(base), device, dtype)
    adapter = {"rank": 16, "alpha": 16.0}
    config = settings(str(base), case.resolution, case.batch, adapter, steps=WARM_UP + case.steps, **case.train)
    learner, _ = build(family, config)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM_UP):
        learner.run_step(step)
    times = [timed_step(learner, WARM_UP + step, gpu) for step in range(case.steps)]
    learner.close()
    result: dict[str, Any] = {
        "step_ms_median": round(median(times), 2),
        "step_ms_p90": round(percentile(times, 90), 2),
        "batch": case.batch,
        "resolution": case.resolution,
        "precision": str(dtype).removeprefix("torch."),
        "rank": 16,
        "steps": case.steps,
        **case.train,
        "weights_millions": round(sum(p.numel() for p in family.denoiser.parameters()) / 1e6, 1),
    }
    if gpu:
        result |= {
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        }
    return result, learner.adapter.state_dict()


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
    parser.add_argument("--deterministic", action="store_true", help="train.deterministic")
    parser.add_argument("--workers", type=int, default=0, help="train.loader_workers")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU instead")
    options = parser.parse_args()
    import torch

    from lorasmith.engine.run_log import quiet_libraries

    quiet_libraries()
    if not (torch.cuda.is_available() or options.smoke):
        skipped = {"benchmark": "gpu_sd15", "skipped": "no NVIDIA GPU that torch can use"}
        print(json.dumps(skipped | facts("torch"), indent=2))
        return 0
    train = {"deterministic": options.deterministic, "loader_workers": options.workers}
    case = Case(64 if options.smoke else 512, options.batch, options.steps, train)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        if options.smoke:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            from tests.tiny import build_tiny_sd15

            result: dict[str, Any] = {"smoke": True}
            result |= measure(build_tiny_sd15(base), torch.device("cpu"), case)
        else:
            device = torch.device("cuda", 0)
            result = {"gpu": torch.cuda.get_device_name(device)}
            result |= measure(write_random_sd15(base, device), device, case)
    print(json.dumps({"benchmark": "gpu_sd15"} | result | facts("torch", "diffusers", "peft"), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
