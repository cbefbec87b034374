"""Write the demo's bundled pictures: `python -m lorasmith.presets.demo.make_pictures` fills `pictures/` and `regular/`.

`pictures/` teaches the concept: 20 scenes whose shape has two eyes. `regular/` holds ordinary scenes, captioned alike,
which keep the LoRA from giving eyes to prompts without the trigger. Seeded, so that two runs write the same files.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

from lorasmith.presets.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    CONCEPT_BACKGROUNDS,
    CONCEPT_SHAPES,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    draw,
)

HERE = Path(__file__).parent


def concept_scenes() -> list[Scene]:
    """Return the 20 scenes of the concept: each colour and shape twice, on backgrounds and at places in turn."""
    pairs = list(product(COLORS, CONCEPT_SHAPES))
    places, backgrounds = list(POSITIONS), list(BACKGROUNDS)
    first = [
        Scene(shape, color, CONCEPT_BACKGROUNDS[i % len(CONCEPT_BACKGROUNDS)]) for i, (color, shape) in enumerate(pairs)
    ]
    second = [
        Scene(shape, color, backgrounds[i % len(backgrounds)], "large", places[i % len(places)])
        for i, (color, shape) in enumerate(pairs)
    ]
    return first + second


def regular_scenes() -> list[Scene]:
    """Return 20 ordinary scenes: each colour and shape of the concept once, and ten of every kind."""
    rng = Random("regular")
    backgrounds = list(BACKGROUNDS)
    pairs = product(COLORS, CONCEPT_SHAPES)
    alike = [Scene(shape, color, backgrounds[i // 2 % len(backgrounds)]) for i, (color, shape) in enumerate(pairs)]
    other = [Scene(*parts) for parts in product(SHAPES, COLORS, BACKGROUNDS, SIZES, POSITIONS)]
    return alike + rng.sample(other, 10)


def write_folder(folder: Path, scenes: list[Scene], concept: bool) -> None:
    """Write one PNG and one `.txt` caption a scene."""
    folder.mkdir(exist_ok=True)
    for index, scene in enumerate(scenes):
        name = f"{index + 1:02d}-{scene.color}-{scene.shape}"
        draw(scene, seed=5000 + index, concept=concept).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(scene.caption() + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_folder(HERE / "pictures", concept_scenes(), concept=True)
    write_folder(HERE / "regular", regular_scenes(), concept=False)
