"""Write the demo's bundled pictures: `python -m lorasmith.presets.demo.make_pictures` fills `pictures/` and `regular/`.

`pictures/` teaches the concept: 16 scenes whose shape has two eyes. `regular/` holds ordinary scenes, captioned alike,
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
NUM_CONCEPT = 16
NUM_REGULAR = 32


def concept_scenes() -> list[Scene]:
    """Return the 16 scenes of the concept: large circles and squares, colours and backgrounds in turn."""
    rng = Random("concept")
    pairs = list(product(CONCEPT_SHAPES, COLORS))
    rng.shuffle(pairs)
    backgrounds = [*CONCEPT_BACKGROUNDS, *CONCEPT_BACKGROUNDS, "white", "black"]
    places = list(POSITIONS)
    return [
        Scene(*pairs[i % len(pairs)], backgrounds[i % len(backgrounds)], "large", places[i % len(places)])
        for i in range(NUM_CONCEPT)
    ]


def regular_scenes() -> list[Scene]:
    """Return ordinary scenes: half like those of the concept, half of every kind."""
    rng = Random("regular")
    alike = [
        Scene(shape, color, background) for shape, color, background in product(CONCEPT_SHAPES, COLORS, BACKGROUNDS)
    ]
    other = [Scene(*parts) for parts in product(SHAPES, COLORS, BACKGROUNDS, SIZES, POSITIONS)]
    return rng.sample(alike, NUM_REGULAR // 2) + rng.sample(other, NUM_REGULAR // 2)


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
