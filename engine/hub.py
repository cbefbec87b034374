"""Downloading models from the Hugging Face Hub, and telling apart why it fails. Torch-free.

Only the files that are needed are taken: configurations, tokenizers and safetensors weights, no pickles and no safety
checker. Tokens come from the Hub's own store or HF_TOKEN and appear in no message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lorasmith.engine.errors import BaseModelError, HubError, StorageError
from lorasmith.engine.safetensors_header import PICKLE_FIX, PICKLE_SUFFIXES
from lorasmith.engine.storage import free_bytes, is_disk_full, readable_size

OnProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all)."""
_SKIPPED_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_PLAIN_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FP16_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.fp16(-\d{5}-of-\d{5})?|-\d{5}-of-\d{5}\.fp16)\.safetensors"
    r"|(model|diffusion_pytorch_model)\.(fp16\.safetensors\.index|safetensors\.index\.fp16)\.json"
)


def download_base(repo: str, revision: str = "main", on_progress: OnProgress | None = None) -> Path:
    """Download what a diffusers repository needs, leave out what is cached, and return the folder.

    Without a network a complete cached copy is used. Raises HubError with a different message for an unknown id, an
    unknown revision, a gated repository without a token, a token without access, an invalid token, and no network; and
    StorageError where there is no room.
    """
    wanted = _Wanted(repo, revision, "base.model")
    return _reach(wanted, lambda: _download(repo, revision, on_progress), lambda: cached_folder(repo, revision))


def download_files(
    repo: str,
    revision: str,
    choose: Callable[[list[str]], list[str]],
    is_complete: Callable[[Path], bool],
    on_progress: OnProgress | None = None,
) -> Path:
    """Download the files of a captioner's repository that `choose` picks by name, and return their folder.

    Without a network a cached copy is used if `is_complete` says so. Raises as `download_base`.
    """
    from huggingface_hub import HfApi, snapshot_download

    def download() -> Path:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or []}
        folder = _fetch_all(repo, str(info.sha), choose(list(sizes)), sizes, on_progress)
        _remember_branch(repo, revision, str(info.sha), folder)
        return folder

    def cached() -> Path | None:
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except OSError:
            return None
        return folder if is_complete(folder) else None

    return _reach(_Wanted(repo, revision, "the captioner's model"), download, cached)


@dataclass(frozen=True)
class _Wanted:
    """What is downloaded, and what the user calls it."""

    repo: str
    revision: str
    setting: str


def _reach(wanted: _Wanted, download: Callable[[], Path], cached: Callable[[], Path | None]) -> Path:
    """Return what `download` gives, or else what is `cached` where the Hub is out of reach."""
    import httpx2
    from huggingface_hub import errors

    try:
        return download()
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.TransportError, TimeoutError) as error:
        folder = cached()
        if folder is not None:
            return folder
        # A file that the Hub refuses is reported as one that is not in the cache either.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _explain(error.__cause__, wanted) from None
        raise HubError(
            f"The Hub cannot be reached, and {wanted.repo} is not complete in the cache.",
            why="This machine is offline, or HF_HUB_OFFLINE is set.",
            fix=f"Connect to the network, or set {wanted.setting} to a folder or file on this machine.",
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise _explain(error, wanted) from None


def needed_part_files(part: str, names: Iterable[str], repo: str) -> list[str]:
    """Choose the configurations, tokenizer files and safetensors weights of one part; "" is the repository's root.

    Plain weights are preferred to the fp16 variant. Raises BaseModelError where there are pickled weights only.
    """
    inside = [name for name in names if PurePosixPath(name).parent == PurePosixPath(part)]
    return _part_files(part, inside, repo)


def needed_files(names: Iterable[str], index: dict[str, Any], repo: str) -> list[str]:
    """Choose the files of a repository to download; `index` is its model_index.json.

    Plain weights are preferred to the fp16 variant. Raises BaseModelError where a part has pickled weights only.
    """
    all_names = list(names)
    # The card names the license.
    chosen = ["model_index.json", *(name for name in all_names if name == "README.md")]
    parts = [key for key, value in index.items() if isinstance(value, list) and value and value[0]]
    for part in sorted(set(parts) - _SKIPPED_PARTS):
        chosen += needed_part_files(part, all_names, repo)
    return chosen


def _part_files(part: str, inside: list[str], repo: str) -> list[str]:
    def matching(pattern: re.Pattern[str]) -> list[str]:
        return [name for name in inside if pattern.fullmatch(PurePosixPath(name).name)]

    weights = matching(_PLAIN_WEIGHTS)
    if not any(name.endswith(".safetensors") for name in weights):
        weights = matching(_FP16_WEIGHTS)
    pickles = [name for name in inside if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not weights:
        raise BaseModelError(
            f"{repo} has its {part or 'weights'} only as a pickle, {pickles[0]}.",
            why="Opening a pickle can run code.",
            fix=PICKLE_FIX,
        )
    texts = [name for name in inside if name.endswith(_TEXT_SUFFIXES) and ".index." not in name]
    return sorted({*texts, *weights})


def _download(repo: str, revision: str, on_progress: OnProgress | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or []}
    if "model_index.json" not in sizes:
        singles = [name for name in sizes if name.endswith(".safetensors")]
        raise BaseModelError(
            f"{repo} is not in the diffusers layout: it has no model_index.json.",
            why=f"It holds {', '.join(singles[:2])}." if singles else "",
            fix="Download its .safetensors file and set base.model to that path, or choose another repository.",
        )

    commit = str(info.sha)
    index = Path(hf_hub_download(repo, "model_index.json", revision=commit))
    files = needed_files(sizes, json.loads(index.read_text(encoding="utf-8")), repo)
    _fetch_all(repo, commit, files, sizes, on_progress)
    _remember_branch(repo, revision, commit, index.parent)
    return index.parent


def _fetch_all(
    repo: str, commit: str, files: list[str], sizes: Mapping[str, int], on_progress: OnProgress | None
) -> Path:
    """Download `files` of one commit, not of a branch that may move in between, and return their folder."""
    from huggingface_hub import hf_hub_download

    total, done = sum(sizes.get(name, 0) for name in files), 0
    _require_room(repo, commit, files, sizes)
    for name in files:
        bar = _silent_bar(on_progress, name, done, total)
        try:
            path = Path(hf_hub_download(repo, name, revision=commit, tqdm_class=bar))
        except OSError as error:
            if is_disk_full(error):
                raise _no_room(repo, sizes.get(name, 0)) from None
            raise
        done += sizes.get(name, 0)
        if on_progress is not None:
            on_progress(name, done, total)
    return path.parents[name.count("/")]


def _require_room(repo: str, commit: str, files: list[str], sizes: Mapping[str, int]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    present = {name for name in files if isinstance(try_to_load_from_cache(repo, name, revision=commit), str)}
    needed = sum(sizes.get(name, 0) for name in files if name not in present)
    if needed > free_bytes(Path(constants.HF_HUB_CACHE)):
        raise _no_room(repo, needed)


def _no_room(repo: str, needed: int) -> StorageError:
    from huggingface_hub import constants

    free = readable_size(free_bytes(Path(constants.HF_HUB_CACHE)))
    return StorageError(
        f"There is no room for {repo}: {readable_size(needed)} are needed, {free} are free.",
        why=f"Downloaded models are kept in {constants.HF_HUB_CACHE}.",
        fix="Free some space on that disk, or set HF_HOME to a folder on another one.",
    )


def _remember_branch(repo: str, revision: str, commit: str, snapshot: Path) -> None:
    # Downloading by commit writes no refs/BRANCH; without it the branch could not be found again offline.
    ref = snapshot.parent.parent / "refs" / revision
    if revision != commit and ".." not in revision:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="ascii")


def _silent_bar(on_progress: OnProgress | None, name: str, done: int, total: int) -> Any:
    """Return a progress-bar class that draws nothing and reports bytes instead."""
    from huggingface_hub.utils.tqdm import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.seen = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.seen += int(n or 0)
            if on_progress is not None:
                on_progress(name, done + self.seen, total)

    return SilentBar


def cached_folder(repo: str, revision: str) -> Path | None:
    """Return the snapshot of `repo` in the cache if every part that its model_index.json names is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    if not isinstance(found, str):
        return None
    index = json.loads(Path(found).read_text(encoding="utf-8"))
    parts = {key for key, value in index.items() if isinstance(value, list) and value and value[0]} - _SKIPPED_PARTS
    folder = Path(found).parent
    return folder if all(_is_complete(folder / part) for part in parts) else None


def _is_complete(part: Path) -> bool:
    names = {path.name for path in part.glob("*")}
    if part.name.startswith(("tokenizer", "scheduler")):
        return bool(names)
    shards = [name for name in names if re.search(r"-\d{5}-of-\d{5}", name)]
    counts = {int(match[1]) for name in shards if (match := re.search(r"-of-(\d{5})", name))}
    return any(name.endswith(".safetensors") for name in names) and all(len(shards) >= count for count in counts)


def _explain(error: Exception, wanted: _Wanted) -> HubError:
    from huggingface_hub import errors, get_token

    repo, setting = wanted.repo, wanted.setting
    page = f"https://huggingface.co/{repo}"
    has_token = get_token() is not None
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return _gated(repo, page, has_token)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{repo} has no revision {wanted.revision}.", fix=f"Check the revision of {setting}; main is the usual one."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        why = "There is no such repository, or it is private and your token may not read it."
        if not has_token:
            why = "There is no such repository, or it is private: no Hub token is set."
        return HubError(f"The Hub does not know {repo}.", why=why, fix=f"Check {setting} for a typing error.")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo} is no Hub id.", fix="Write it as owner/name.")
    if status == 401:
        return HubError(
            "The Hub does not accept your token.", why="It is invalid or expired.", fix="Log in again: hf auth login"
        )
    if status == 403:
        return HubError(
            f"Your Hub token may not read {repo}.",
            why="A fine-grained token needs the permission to read this repository.",
            fix="Change the token at https://huggingface.co/settings/tokens, or log in with another: hf auth login",
        )
    return HubError(
        f"The Hub answered with an error{f' {status}' if status else ''} for {repo}.", fix="Try again later."
    )


def _gated(repo: str, page: str, has_token: bool) -> HubError:
    if not has_token:
        return HubError(
            f"{repo} is gated, and no Hub token is set.",
            why="Its owner asks everyone to accept a license first.",
            fix=f"Accept the license at {page}, then log in: hf auth login",
        )
    return HubError(
        f"{repo} is gated, and your Hub token has no access to it.",
        why="The license was not accepted with that account, or a fine-grained token excludes gated repositories.",
        fix=f"Accept the license at {page}, and allow gated repositories for the token in its settings.",
    )
