"""A fake NVIDIA management library, compiled on the spot, so that the real pynvml is exercised without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
GIB = 1 << 30
H200: dict[str, object] = {
    "uuid": "GPU-aaaa1111-0000-0000-0000-000000000000",
    "name": "NVIDIA H200",
    "total": 140 * GIB,
    "used": 10 * GIB,
    "capability": 90,
    "utilization": 37,
    "temperature": 54,
    "power": 312500,
}


def compiler() -> str | None:
    """Return the C compiler's path, or None where there is none."""
    return shutil.which("gcc") or shutil.which("cc")


def build_library(folder: Path, *, old_driver: bool = False) -> Path:
    """Compile `libnvidia-ml.so.1` into `folder` and return its path."""
    found = compiler()
    assert found is not None, "no C compiler"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    options = ["-DOLD_DRIVER"] if old_driver else []
    subprocess.run(
        [found, "-Wall", "-Werror", "-shared", "-fPIC", *options, "-o", str(library), str(SOURCE)], check=True
    )
    return library


class FakeState:
    """What the fake answers from now on; each change is seen by the library's next call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, object] = {"driver": "580.95.05", "cuda": 13000, "count": 0}
        self._write()

    def add_gpu(self, **facts: object) -> None:
        """Add a GPU like `H200`, except for `facts`."""
        index = self.values["count"]
        assert isinstance(index, int)
        self.change(count=index + 1, **{f"{index}.{key}": value for key, value in (H200 | facts).items()})

    def change(self, **values: object) -> None:
        """Set keys, e.g. `change(**{"0.used": 5})`."""
        self.values |= values
        self._write()

    def fail(self, function: str, code: int) -> None:
        """Make `function` (or `function.GPU`) return an error code; 0 heals it."""
        self.change(**{f"error.{function}": code})

    def delay(self, function: str, seconds: float) -> None:
        """Make `function` slow."""
        self.change(**{f"delay.{function}": int(seconds * 1000)})

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text("".join(f"{key}={value}\n" for key, value in self.values.items()))
        new.replace(self.path)
