"""A tiny training as the command line sees it: a base model, pictures and a run file, in a folder of any name."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import tomlkit

from tests.tiny import tiny_pictures


@dataclass(frozen=True)
class TinyRun:
    """The folder of one test with everything that `lorasmith train` needs."""

    root: Path
    run_file: Path
    pictures: Path
    output: Path

    def args(self, *more: str) -> list[str]:
        """Return the arguments of `lorasmith train` with `more` settings."""
        return ["train", str(self.run_file), *(part for setting in more for part in ("--set", setting))]


def make_tiny_run(root: Path, base: Path, *, steps: int = 4, name: str = "tiny") -> TinyRun:
    """Write pictures and a run file below `root`; the base model is used where it is."""
    root.mkdir(parents=True, exist_ok=True)
    pictures, output = root / "pictures", root / "runs"
    tiny_pictures(pictures, 3)
    settings = {
        "run": {"name": name, "output_folder": str(output)},
        "base": {"model": str(base)},
        "dataset": {"folder": str(pictures), "resolution": 64},
        "captions": {"trigger": "zqx"},
        "adapter": {"rank": 2, "alpha": 2},
        "train": {"steps": steps, "device": "cpu", "log_every": 1},
        "checkpoints": {"every": 0},
        "previews": {"every": 0, "steps": 1},
    }
    run_file = root / "run.toml"
    run_file.write_text(tomlkit.dumps(settings), encoding="utf-8")
    return TinyRun(root, run_file, pictures, output)


def copy_base(base: Path, target: Path) -> Path:
    """Copy a base model, to damage it or to give its folder another name."""
    shutil.copytree(base, target)
    return target
