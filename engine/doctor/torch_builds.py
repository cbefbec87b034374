"""Which of torch's builds runs on which GPU and driver, and the command that installs it. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

TORCH_PIN: Final = "2.13.0"
"""The same pin as in constraints.txt (a test compares them)."""

MINIMUM_DRIVERS: Final = {13: 580, 12: 525, 11: 450}
"""The oldest driver for each major CUDA version; within one, older drivers run newer toolkits.

Source: docs.nvidia.com/deploy/cuda-compatibility, "Minor Version Compatibility", table 1."""


@dataclass(frozen=True)
class Build:
    """One build of torch: its name in the index of wheels, its CUDA version and the GPUs that it has code for."""

    name: str
    cuda: tuple[int, int]
    oldest: tuple[int, int]
    newest: tuple[int, int]

    @property
    def minimum_driver(self) -> int:
        """The oldest driver that runs it."""
        return MINIMUM_DRIVERS[self.cuda[0]]

    @property
    def command(self) -> str:
        """The command that installs it into this environment, with the CUDA libraries that it needs."""
        wheel = f"'torch=={TORCH_PIN}+{self.name}'"
        return f"{sys.executable} -m pip install {wheel} --index-url https://download.pytorch.org/whl/{self.name}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Tell whether it has code for a GPU of this compute capability."""
        return self.oldest <= capability <= self.newest


BUILDS: Final = (
    # The newest GPUs run its PTX for 12.0, which Linux builds have.
    Build("cu130", (13, 0), (7, 5), (99, 0)),
    Build("cu126", (12, 6), (5, 0), (9, 0)),
)
"""The stable build of 2.13 and the one for older GPUs and drivers, the better one first.

Source: pytorch/pytorch RELEASE.md, "CUDA Support Matrix" (pull requests 182849 and 197555)."""


def suitable_build(capability: tuple[int, int] | None, cuda_driver: tuple[int, int] | None) -> Build | None:
    """Return the best build for a GPU and the newest CUDA version that its driver runs; None where none fits."""
    for build in BUILDS:
        fits_driver = cuda_driver is None or cuda_driver[0] >= build.cuda[0]
        if fits_driver and (capability is None or build.runs_on(capability)):
            return build
    return None


def how_to_mend(capability: tuple[int, int] | None, cuda_driver: tuple[int, int] | None) -> str:
    """Return one line that makes torch and GPU fit: a build of torch, or else the driver or the card."""
    build = suitable_build(capability, cuda_driver)
    if build is not None:
        return build.command
    build = suitable_build(capability, None)
    if build is None:
        return "No build of torch has code for this card any more: use another one, or --set train.device=cpu"
    return f"Update the NVIDIA driver to {build.minimum_driver} or newer, then: {build.command}"


def has_code_for(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Tell whether code for one of `architectures` runs on the GPU: same major and no higher minor, or older PTX.

    The names are those of `torch.cuda.get_arch_list()`, such as `sm_90`, `sm_90a` and `compute_120`.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(character for character in number if character.isdigit())
        if not digits:
            continue
        of = int(digits[:-1]), int(digits[-1])
        # sm_90a and the like use what only that one architecture has.
        only = kind == "sm" and number != digits
        runs = of == (major, minor) if only else of <= (major, minor) and (kind == "compute" or of[0] == major)
        if runs:
            return True
    return False
