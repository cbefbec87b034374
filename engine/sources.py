"""Locating base models: an embedded one, a folder, one file or a Hub id, and what their headers say. Torch-free.

Weights are read as safetensors only. A pickle can run code when it is opened, so `.ckpt`, `.pt` and `.bin` are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.engine.errors import BaseModelError, HubError, StorageError
from lorasmith.engine.safetensors_header import PICKLE_FIX, PICKLE_SUFFIXES, refuse_format
from lorasmith.engine.safetensors_header import TensorInfo as TensorInfo
from lorasmith.engine.safetensors_header import read_header as read_header
from lorasmith.engine.storage import atomic_write, cache_folder

if TYPE_CHECKING:
    from lorasmith.engine.config import BaseSettings

MAX_CONFIG_BYTES = 10_000_000
MAX_CARD_CHARACTERS = 100_000
_CARD_FIELD = re.compile(r"(?P<key>license|license_name):(?P<value>.*)")
_WEIGHT_FILE = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
_SHARD_VARIANT = re.compile(r"-\d{5}-of-\d{5}\.(?P<variant>\w+)\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(rf"(?P<repo>{_HUB_ID.pattern})/(?P<file>[\w.][^\\\0]*\.safetensors)")

OnProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all)."""


@dataclass(frozen=True)
class BaseFiles:
    """A located base model: a folder in the diffusers layout, or one file. `origin` is what the user wrote.

    `vae_file` and `encoder_files` are parts that the user gave apart (base.vae, base.text_encoders).
    """

    kind: Literal["folder", "single_file"]
    path: Path
    origin: str
    vae_file: Path | None = None
    encoder_files: tuple[Path, ...] = ()

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part such as `unet` or `scheduler`; "" is model_index.json; {} where absent."""
        if self.kind == "single_file":
            return {}
        if not part:
            return _read_json(self.path / "model_index.json")
        folder = self.path / part
        return _read_json(folder / "config.json") or _read_json(folder / f"{part.split('_')[0]}_config.json")

    def weight_files(self, part: str) -> list[Path]:
        """Return the safetensors files of a part: the plain ones, or the fp16 variant where only that exists.

        Raises BaseModelError where the part has pickled weights only.
        """
        if part == "vae" and self.vae_file:
            return [self.vae_file]
        if part.startswith("text_encoder") and self.encoder_files:
            return list(self.encoder_files)
        if self.kind == "single_file":
            return [self.path]
        by_variant: dict[str, list[Path]] = {}
        for path in sorted((self.path / part).glob("*.safetensors")):
            by_variant.setdefault(_variant(path.name) or "", []).append(path)
        files = by_variant.get("") or by_variant.get("fp16") or []
        pickles = [path for suffix in PICKLE_SUFFIXES for path in sorted((self.path / part).glob(f"*{suffix}"))]
        if pickles and not files:
            raise BaseModelError(
                f"{self.origin} has its {part or 'weights'} only as a pickle, {pickles[0].name}.",
                why="Opening a pickle can run code.",
                fix=PICKLE_FIX,
            )
        return files

    def variant(self, part: str) -> str | None:
        """Return the variant of a part's weight files, e.g. "fp16", or None for the plain ones."""
        files = self.weight_files(part)
        return _variant(files[0].name) if files and self.kind == "folder" else None

    def tensors(self, part: str) -> dict[str, TensorInfo]:
        """Return the tensors of a part's weight files; of one file, "" is all of it; {} where there are none."""
        found: dict[str, TensorInfo] = {}
        for path in self.weight_files(part):
            found |= read_header(path)[0]
        return found

    def metadata(self) -> dict[str, str]:
        """Return the header metadata of one file; {} for a folder."""
        return read_header(self.path)[1] if self.kind == "single_file" else {}

    def license(self) -> str:
        """Return the license that the model card of a folder names, e.g. `apache-2.0`; "" where nothing is told."""
        return _card_license(self.path / "README.md") if self.kind == "folder" else ""

    def describe(self) -> str:
        """Say in one sentence what the files seem to be, for the message that no family knows them."""
        return _describe_file(self) if self.kind == "single_file" else _describe_folder(self)

    def fingerprint(self, *parts: str) -> str:
        """Return the SHA-256 over the names and contents of the parts' configuration and weight files.

        Whole files are hashed, since two fine-tunes differ in the middle only; each file's hash is remembered by
        path, size and time of change, so that only the first call takes long.
        """
        paths: list[Path] = []
        for part in parts:
            found = self.weight_files(part)
            if self.kind == "folder":
                found = [*found, *(path for path in sorted((self.path / part).glob("*.json")) if path.is_file())]
            if not found:
                raise BaseModelError(f"{self.origin} has no {part}.", fix="Choose a complete base model.")
            paths += [path for path in found if path not in paths]
        total = hashlib.sha256()
        for path in paths:
            total.update(f"{path.name}\0{_file_hash(path)}\n".encode())
        return total.hexdigest()


def locate_base(model: str, revision: str = "main", on_progress: OnProgress | None = None) -> BaseFiles:
    """Find a base model by what the user wrote: `demo`, an existing path, or a Hub id, which is downloaded.

    Raises BaseModelError where there is nothing of the kind, and HubError where the Hub refuses or is out of reach.
    """
    name = model.strip()
    if not name:
        raise BaseModelError("No base model is chosen.", fix="Set base.model, e.g. to demo.")
    if name == "demo":
        return _locate_demo()
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            refuse_format(path)
        read_header(path)
        return BaseFiles("single_file", path.resolve(), model)
    if path.is_dir():
        return BaseFiles("folder", path.resolve(), model)
    if hub_file(name):
        return BaseFiles("single_file", _hub_path(name, revision, "base.model", on_progress), model)
    if not is_hub_id(name):
        raise BaseModelError(
            f"There is no file or folder {name}.",
            why="It is no Hub id either, which would be written owner/name.",
            fix="Check base.model.",
        )
    from lorasmith.engine.hub import download_base

    return BaseFiles("folder", download_base(name, revision, on_progress), model)


def locate_configured(settings: BaseSettings, on_progress: OnProgress | None = None) -> BaseFiles:
    """Find the base model of a run with the parts that it names apart; raises as `locate_base`."""
    files = locate_base(settings.model, settings.revision, on_progress)
    vae = _part_file(settings.vae, "base.vae", on_progress) if settings.vae else None
    encoders = tuple(_part_file(name, "base.text_encoders", on_progress) for name in settings.text_encoders)
    return dataclasses.replace(files, vae_file=vae, encoder_files=encoders)


def locate_here(settings: BaseSettings) -> BaseFiles | None:
    """Find the base model of a run where it is on this machine; None where it would be downloaded or none is named.

    Raises as `locate_base`.
    """
    name = settings.model.strip()
    if is_hub_id(name):
        from lorasmith.engine.hub import cached_folder

        folder = cached_folder(name, settings.revision)
        return None if folder is None else BaseFiles("folder", folder, name)
    if not name or any(on_hub(part) for part in (name, settings.vae, *settings.text_encoders)):
        return None
    return locate_configured(settings)


def _part_file(name: str, setting: str, on_progress: OnProgress | None) -> Path:
    path = Path(name).expanduser()
    if hub_file(name):
        path = _hub_path(name, "main", setting, on_progress)
    if not path.is_file():
        raise BaseModelError(f"There is no file {name}.", fix=f"Check {setting}.")
    if path.suffix.lower() != ".safetensors":
        refuse_format(path)
    read_header(path)
    return path.resolve()


def _hub_path(name: str, revision: str, setting: str, on_progress: OnProgress | None) -> Path:
    """Download the one file that `name` is on the Hub; its path keeps the file's own name."""
    from lorasmith.engine.hub import download_file

    repo, file = hub_file(name) or ("", "")
    try:
        path = download_file(repo, file, revision, setting, on_progress)
    except HubError as error:
        why = f"There is no file {name} on this machine, so it was looked for on the Hub. {error.why}".strip()
        raise HubError(error.what, why=why, fix=error.fix) from None
    read_header(path)
    return path


def on_hub(model: str) -> bool:
    """Whether `model` names something on the Hub, a repository or one file."""
    return is_hub_id(model) or hub_file(model) is not None


def hub_file(model: str) -> tuple[str, str] | None:
    """Return repository and file where `model` can only mean a file on the Hub (`owner/name/…/file.safetensors`)."""
    name = model.strip()
    match = _HUB_FILE.fullmatch(name)
    parts = name.split("/")
    # A relative path with a typing error begins with a folder that is there.
    if match is None or ".." in parts or Path(parts[0]).exists():
        return None
    return match["repo"], match["file"]


def is_hub_id(model: str) -> bool:
    """Whether `model` can only mean a repository on the Hub: it looks like owner/name and no such path exists."""
    name = model.strip()
    if name == "demo" or name.endswith(".safetensors") or Path(name).expanduser().exists():
        return False
    return _HUB_ID.fullmatch(name) is not None


def _locate_demo() -> BaseFiles:
    import lorasmith.presets

    folder = Path(next(iter(lorasmith.presets.__path__))) / "demo" / "base"
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            "The embedded demo base is not part of this installation.",
            why=f"{folder} holds no model.",
            fix="Install lorasmith again, or choose another base model.",
        )
    return BaseFiles("folder", folder, "demo")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is larger than 10 MB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"Cannot read {path}.", why=str(error), fix="Download the base model again.") from None
    return values


def _card_license(card: Path) -> str:
    """Return the license in the lines between the two `---` at the start of a Hub model card."""
    try:
        with card.open(encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(MAX_CARD_CHARACTERS).splitlines()
    except OSError:
        return ""
    if not lines or lines[0].rstrip() != "---" or "---" not in lines[1:]:
        return ""
    fields = {"license": "", "license_name": ""}
    for line in lines[1 : lines.index("---", 1)]:
        if match := _CARD_FIELD.fullmatch(line):
            fields[match["key"]] = match["value"].partition(" #")[0].strip().strip("\"'")
    # For a license that the Hub has no name for, cards say `other` and give the name in a field of its own.
    own = fields["license_name"] if fields["license"] == "other" else ""
    return own or fields["license"]


def _variant(name: str) -> str | None:
    # Two spellings are about: NAME.fp16-00001-of-00002.safetensors and NAME-00001-of-00002.fp16.safetensors.
    match = _SHARD_VARIANT.search(name) or _WEIGHT_FILE.fullmatch(name)
    return match["variant"] if match else "other"


_SIGNS: tuple[tuple[str, str], ...] = (
    (r"\.lora_(A|B|down|up)\b|\.lora_(A|B)\.|hada_w1|lokr_w|\.dora_scale", "a LoRA, not a base model"),
    (r"^(control_model\.|controlnet_|controlnet_cond)", "a ControlNet, not a base model"),
    (r"^conditioner\.embedders\.1\.", "an SDXL checkpoint"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner checkpoint"),
    (r"^(model\.diffusion_model\.)?double_blocks\.", "a FLUX transformer"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 checkpoint"),
    (r"^single_transformer_blocks\.", "a FLUX transformer in the diffusers layout, without its other parts"),
    (r"^transformer_blocks\.", "a diffusion transformer in the diffusers layout, without its other parts"),
    (r"^model\.diffusion_model\.input_blocks\.", "a Stable Diffusion checkpoint in the original layout"),
    (r"^(down_blocks|mid_block|up_blocks)\.", "a UNet in the diffusers layout, without its other parts"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid)", "an autoencoder (VAE), not a base model"),
    (r"^(text_model|transformer\.text_model)\.", "a text encoder, not a base model"),
    (r"^(emb_params|clip_l|clip_g|string_to_param)$", "a textual inversion embedding, not a base model"),
)


def _describe_file(files: BaseFiles) -> str:
    tensors = files.tensors("")
    for sign, words in _SIGNS:
        if any(re.search(sign, name) for name in tensors):
            return f"{files.path.name} looks like {words} ({len(tensors)} tensors{_details(tensors)})."
    sample = ", ".join(list(tensors)[:2]) or "none"
    return f"{files.path.name} holds {len(tensors)} tensors with unknown names, such as {sample}."


def _details(tensors: dict[str, TensorInfo]) -> str:
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    channels = first.shape[1] if first and len(first.shape) == 4 else 4
    return f", {channels} input channels: made for inpainting or editing" if channels > 4 else ""


def _describe_folder(files: BaseFiles) -> str:
    name = files.config("").get("_class_name")
    if name:
        return f"Its model_index.json names the pipeline {name}."
    inside = [path.name for path in _entries(files.path)]
    single = next((entry for entry in inside if entry.endswith(".safetensors")), None)
    if single:
        return f"The folder has no model_index.json; its file {single} may be meant."
    return f"The folder has no model_index.json, only {', '.join(inside[:4]) or 'nothing'}."


def _entries(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _file_hash(path: Path) -> str:
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    memo = cache_folder() / "hashes" / key
    try:
        known = memo.read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    except (OSError, UnicodeDecodeError):
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(memo, digest)
    return digest


def _remember(memo: Path, digest: str) -> None:
    # A memory that cannot be written costs time only.
    with contextlib.suppress(OSError, StorageError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(memo, digest.encode())
