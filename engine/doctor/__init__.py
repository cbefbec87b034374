"""Checks of the installation and the machine, each with a one-line fix, before hours are spent on it.

Every check is tried for real where that is possible (a bf16 product, an 8-bit optimizer step) and is isolated: a broken
library is a failed check, not a crash. torch is imported only by the checks that need it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import locale
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasmith.engine.hardware import HardwareSnapshot, snapshot, torch_build
from lorasmith.engine.run_log import plain_text, quiet_libraries
from lorasmith.engine.storage import cache_folder, nearest_existing

Status = Literal["pass", "warn", "fail", "skip"]

TORCH_PIN = "2.13.0"
"""The same pin as in constraints.txt (a test compares them)."""
MINIMUM_PYTHON = (3, 11)
LOW_RAM_GIB, LOW_DISK_GIB, MINIMUM_DISK_GIB = 8.0, 10.0, 1.0
HUB_URL = "https://huggingface.co"
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `fix` is one line that the user can follow, empty where nothing is to be done."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def run_checks(
    output_folder: Path | None = None,
    *,
    ask_hub: bool = False,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Run every check in order, telling each result to `on_check` as it comes; never raises.

    `output_folder` is where runs will be made (default: `runs` in the current folder). The Hub is only asked with
    `ask_hub`. Takes some seconds, most of them the import of torch. Where there is a GPU, this process holds a CUDA
    context afterwards, and torch sees the GPUs that CUDA_VISIBLE_DEVICES named before.
    """
    quiet_libraries()
    machine = snapshot()
    output = output_folder or Path("runs")
    checks: Sequence[tuple[str, Callable[[], Check]]] = (
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("gpu", lambda: check_gpu(machine)),
        ("cuda", lambda: check_cuda(machine)),
        ("bf16", check_bf16),
        ("bitsandbytes", check_bitsandbytes),
        ("memory", lambda: check_memory(machine)),
        ("output folder", lambda: check_disk("output folder", output, "run.output_folder")),
        ("cache folder", lambda: check_disk("cache folder", cache_folder(), "the variable LORASMITH_CACHE")),
        ("locale", check_locale),
        ("terminal", check_terminal),
        ("hub", lambda: check_hub(ask_hub)),
    )
    results = []
    for name, check in checks:
        results.append(_isolated(name, check))
        if on_check:
            on_check(results[-1])
    return results


def check_python() -> Check:
    """Python is 3.11 or newer."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MINIMUM_PYTHON:
        return Check("python", "fail", f"Python {version}", "Make the environment anew with Python 3.11 or newer.")
    return Check("python", "pass", f"Python {version}")


def check_packages() -> Check:
    """Every package that lorasmith depends on is there in a version that it was tested with."""
    from packaging.requirements import Requirement

    wrong, fixes = [], []
    for line in importlib.metadata.requires("lorasmith") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is installed, {requirement.specifier} is needed")
        else:
            continue
        fixes.append(_requirement(requirement.name))
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), _reinstall(*fixes))
    return Check("packages", "pass", "all at tested versions")


def check_torch() -> Check:
    """The installed torch is the pinned one and can be imported."""
    torch = importlib.import_module("torch")
    version = str(torch.__version__)
    if version.partition("+")[0] != TORCH_PIN:
        return Check(
            "torch", "warn", f"torch {version}; lorasmith is tested with {TORCH_PIN}", _reinstall(f"torch=={TORCH_PIN}")
        )
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check("torch", "pass", f"torch {version}, {build}")


def check_gpu(machine: HardwareSnapshot) -> Check:
    """There is an NVIDIA GPU and its driver answers."""
    if not machine.gpus:
        fix = "With an NVIDIA GPU in the machine: install its driver. Without one, training on the CPU works, slowly."
        return Check("gpu", "warn", machine.note or "No NVIDIA GPU was found.", fix)
    words = []
    for gpu in machine.gpus:
        free = f", {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free" if gpu.free_gib and gpu.total_gib else ""
        words.append(f"{gpu.name}{free} ({gpu.uuid})")
    detail = "; ".join(words)
    if machine.note:
        return Check("gpu", "warn", f"{detail}. {machine.note}", "Restart the machine, or use the GPUs that answer.")
    return Check("gpu", "pass", detail)


def check_cuda(machine: HardwareSnapshot) -> Check:
    """torch's CUDA build, the driver and the GPU fit together, proved by a product of two matrices on the GPU."""
    build = torch_build()
    if not machine.gpus:
        return Check("cuda", "skip", "no NVIDIA GPU")
    if build is None or build.cuda is None:
        detail = f"There is a GPU, but torch {build.version if build else ''} cannot use it.".replace("  ", " ")
        return Check(
            "cuda",
            "fail",
            detail,
            "Install torch's CUDA build: pytorch.org/get-started lists the command for your driver.",
        )
    wanted = int(build.cuda.partition(".")[0])
    if machine.cuda_driver and machine.cuda_driver[0] < wanted:
        have = ".".join(map(str, machine.cuda_driver))
        detail = f"torch is built for CUDA {build.cuda}, driver {machine.gpus[0].driver} runs up to CUDA {have}."
        return Check("cuda", "fail", detail, "Update the NVIDIA driver.")
    return _try_cuda(build.cuda)


def _try_cuda(cuda: str) -> Check:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        fix = "Check CUDA_VISIBLE_DEVICES and the driver: nvidia-smi must list the GPU."
        return Check("cuda", "fail", f"torch for CUDA {cuda} finds no usable GPU.", fix)
    major, minor = torch.cuda.get_device_capability()
    architectures = torch.cuda.get_arch_list()
    if not _runs_on(architectures, major, minor):
        detail = (
            f"torch for CUDA {cuda} has no code for this GPU (sm_{major}{minor}; it has {', '.join(architectures)})."
        )
        return Check(
            "cuda", "fail", detail, f"Install a torch {TORCH_PIN} build for a CUDA version that knows this GPU."
        )
    product = torch.full((64, 64), 2.0, device="cuda") @ torch.full((64, 64), 3.0, device="cuda")
    if product[0, 0].item() != 384.0:
        return Check(
            "cuda", "fail", "The GPU multiplies wrongly.", "Update the driver; if it stays, the GPU is broken."
        )
    return Check("cuda", "pass", f"CUDA {cuda} on sm_{major}{minor}")


def _runs_on(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Tell whether code for one of `architectures` runs on the GPU: same major and lower minor, or older PTX."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(character for character in number if character.isdigit())
        if not digits:
            continue
        of_major, of_minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and of_major == major and of_minor <= minor:
            return True
        if kind == "compute" and (of_major, of_minor) <= (major, minor):
            return True
    return False


def check_bf16() -> Check:
    """A bf16 product of two matrices is right, on the device that `auto` takes."""
    torch = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    product = torch.full((64, 64), 2.0, dtype=torch.bfloat16, device=device) @ torch.full(
        (64, 64), 3.0, dtype=torch.bfloat16, device=device
    )
    if product[0, 0].item() != 384.0:
        fix = "Set train.precision to fp32."
        return Check("bf16", "fail", f"bf16 gives wrong numbers on the {device}.", fix)
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return Check("bf16", "warn", "This GPU computes bf16 slowly.", "Set train.precision to fp16.")
    return Check("bf16", "pass", f"works on the {device}")


def check_bitsandbytes() -> Check:
    """One real step of 8-bit AdamW moves the weights by its learning rate."""
    torch = importlib.import_module("torch")
    bitsandbytes = importlib.import_module("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Below 4096 numbers bitsandbytes keeps 32-bit state and the 8-bit code would not run.
    weights = torch.nn.Parameter(torch.ones(8192, device=device))
    weights.grad = torch.ones_like(weights)
    optimizer = bitsandbytes.optim.AdamW8bit([weights], lr=0.01, weight_decay=0.0)
    optimizer.step()
    moved = float((1.0 - weights.detach()).mean())
    if abs(moved - 0.01) > 0.001 or optimizer.state[weights]["state1"].dtype != torch.uint8:
        detail = f"A step of 8-bit AdamW moved the weights by {moved:.4f} instead of 0.01."
        return Check("bitsandbytes", "fail", detail, "Set optimizer.name to adamw, or reinstall bitsandbytes.")
    return Check("bitsandbytes", "pass", f"8-bit AdamW works on the {device} ({bitsandbytes.__version__})")


def check_memory(machine: HardwareSnapshot) -> Check:
    """There is enough system memory to load a base model."""
    memory = machine.memory
    detail = f"{memory.available_gib:.1f} of {memory.total_gib:.1f} GiB available"
    detail += " (limited by the container)" if memory.limited else ""
    if memory.available_gib < LOW_RAM_GIB:
        return Check("memory", "warn", detail, "Close other programs; large base models need more to load.")
    return Check("memory", "pass", detail)


def check_disk(name: str, folder: Path, setting: str) -> Check:
    """The folder, or the one in which it would be made, can be written to and has room."""
    place = nearest_existing(folder.expanduser())
    where = f"Choose another folder with {setting}."
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{place} cannot be written to.", where)
    free = shutil.disk_usage(place).free / (1 << 30)
    detail = f"{free:.1f} GiB free in {place}"
    if free < MINIMUM_DISK_GIB:
        return Check(name, "fail", detail, f"Free some space. {where}")
    if free < LOW_DISK_GIB:
        return Check(name, "warn", detail, f"Enough for a small run only. {where}")
    return Check(name, "pass", detail)


def check_locale() -> Check:
    """Text is UTF-8, so that file names and captions of every language survive."""
    encodings = {locale.getpreferredencoding(False), sys.getfilesystemencoding()}
    if any(name.lower().replace("-", "") != "utf8" for name in encodings):
        return Check("locale", "warn", f"The text encoding is {', '.join(sorted(encodings))}.", "export LANG=C.UTF-8")
    return Check("locale", "pass", "UTF-8")


def check_terminal() -> Check:
    """The terminal can show the wizard: a known kind, 80 x 24 at least."""
    if not sys.stdout.isatty():
        return Check("terminal", "skip", "the output is not a terminal")
    kind = os.environ.get("TERM", "")
    size = shutil.get_terminal_size()
    colors = "true color" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256 or fewer colors announced"
    inside = " inside tmux" if os.environ.get("TMUX") else ""
    detail = f"{kind or 'unknown kind'}{inside}, {size.columns} x {size.lines}, {colors}"
    if kind in ("", "dumb"):
        return Check("terminal", "warn", detail, "export TERM=xterm-256color, or train with lorasmith train RUN.toml.")
    if size.columns < 80 or size.lines < 24:
        return Check("terminal", "warn", detail, "Make the window at least 80 x 24.")
    return Check("terminal", "pass", detail)


def check_hub(ask: bool) -> Check:
    """The Hub answers, which is only tried when the user asked for it."""
    if not ask:
        return Check("hub", "skip", "not asked")
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(HUB_URL, timeout=HUB_SECONDS) as answer:
            return Check("hub", "pass", f"{HUB_URL} answers ({answer.status})")
    except (urllib.error.URLError, OSError) as error:
        fix = "Check the network or HTTPS_PROXY; base models that are already on this machine work without it."
        return Check("hub", "warn", f"{HUB_URL} cannot be reached: {error}", fix)


def _isolated(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = str(error).strip().splitlines() or ["no message"]
        return Check(name, "fail", plain_text(f"{type(error).__name__}: {lines[0]}"), _fix_of(name))


def _fix_of(check: str) -> str:
    """Return what helps where a check itself broke down."""
    if check == "bitsandbytes":
        return f"Set optimizer.name to adamw, or: {_reinstall(_requirement(check))}"
    if check in ("torch", "cuda", "bf16"):
        return _reinstall(_requirement("torch"))
    return "Please report this: lorasmith could not run its own check."


def _reinstall(*requirements: str) -> str:
    wanted = " ".join(f"'{requirement}'" for requirement in requirements)
    return f"{sys.executable} -m pip install --force-reinstall --no-deps {wanted}"


def _requirement(package: str) -> str:
    from packaging.requirements import Requirement

    if package == "torch":
        return f"torch=={TORCH_PIN}"
    found = [Requirement(line) for line in importlib.metadata.requires("lorasmith") or []]
    return next((f"{each.name}{each.specifier}" for each in found if each.name == package), package)
