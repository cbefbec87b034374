"""Two models' memory in round figures, for tests that need some and not the right ones."""

from __future__ import annotations

from lorasmith.engine.memory import BlockGroup, Law, ModelMemory, PartMemory, StepLaws, StepMemory


def big_transformer() -> ModelMemory:
    """About FLUX.1: 11.9 B weights, 57 blocks, 22.2 GiB in bf16."""
    laws = StepLaws(
        none=Law(200.0, 3500.0, 29_500.0),
        half=Law(200.0, 1900.0, 16_000.0),
        all=Law(200.0, 240.0, 2_040.0),
        rank_none=Law(0.0, 1.0, 8.0),
        rank_all=Law(0.0, 0.02, 0.2),
    )
    slim = StepLaws(
        none=Law(200.0, 2700.0, 22_000.0),
        half=Law(200.0, 1400.0, 12_000.0),
        all=Law(200.0, 200.0, 1_700.0),
        rank_none=Law(0.0, 0.5, 4.0),
        rank_all=Law(0.0, 0.01, 0.1),
    )
    step = StepMemory(per_rank=1_200_000, fp32=laws, base=slim)
    return ModelMemory(
        family="flux1",
        name="sample",
        label="A large transformer",
        hub="someone/large",
        denoiser=PartMemory(packed=11_800_000_000, plain=100_000_000, layer=57_000_000),
        blocks=(
            BlockGroup("FluxTransformerBlock", 19, 340_000_000, 1_000),
            BlockGroup("FluxSingleTransformerBlock", 38, 141_000_000, 1_000),
        ),
        text={
            "text_encoder": PartMemory(85_000_000, 38_000_000, 2_400_000, work=Law(20.0, 10.0)),
            "text_encoder_2": PartMemory(4_600_000_000, 130_000_000, 42_000_000, work=Law(100.0, 120.0)),
        },
        autoencoder=PartMemory(0, 84_000_000, work=Law(50.0, 0.0, 1800.0), decode=Law(50.0, 0.0, 3200.0)),
        draw=Law(100.0, 60.0, 520.0),
        inputs=Law(0.0, 170.0, 1_400.0),
        tflop=(6.0, 40.0, 6.0),
        kernels=(13_203, 18_789),
        steps={"attention": step, "attention-mlp": step, "all-linear": step},
    )


def small_unet() -> ModelMemory:
    """About SDXL: 2.57 B weights of which 2.2 B lie in linear layers, 81 blocks."""
    laws = StepLaws(
        none=Law(300.0, 100.0, 7_000.0),
        half=Law(300.0, 60.0, 3_800.0),
        all=Law(300.0, 20.0, 560.0),
        rank_none=Law(0.0, 0.0, 3.0),
        rank_all=Law(0.0, 0.0, 0.1),
    )
    step = StepMemory(per_rank=1_450_000, fp32=laws, base=laws)
    return ModelMemory(
        family="sdxl",
        name="sample",
        label="A small UNet",
        hub="someone/small",
        denoiser=PartMemory(packed=2_200_000_000, plain=367_000_000, layer=13_000_000),
        blocks=(
            BlockGroup("BasicTransformerBlock", 70, 30_000_000, 10_000),
            BlockGroup("ResnetBlock2D", 11, 0, 20_000_000),
        ),
        text={
            "text_encoder": PartMemory(85_000_000, 38_000_000, 2_400_000, work=Law(20.0, 5.0)),
            "text_encoder_2": PartMemory(630_000_000, 64_000_000, 6_600_000, work=Law(20.0, 10.0)),
        },
        autoencoder=PartMemory(0, 84_000_000, work=Law(50.0, 0.0, 1800.0), decode=Law(50.0, 0.0, 3200.0)),
        draw=Law(50.0, 10.0, 400.0),
        inputs=Law(0.0, 5.0, 300.0),
        tflop=(0.1, 6.0, 0.6),
        kernels=(11_537, 16_411),
        steps={"attention": step, "attention-mlp": step, "all-linear": step},
    )
