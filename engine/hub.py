"""Downloading models from the Hugging Face Hub, and telling apart why it fails. Torch-free.

Only the files that are needed are taken: configurations, tokenizers and safetensors weights, no pickles and no safety
checker. Tokens come from the Hub's own store or HF_TOKEN and appear in no message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lorasmith.engine.errors import BaseModelError, HubError, StorageError
from lorasmith.engine.hub_choice import INDEXES, SKIPPED_PARTS, index_of, needed_files
from lorasmith.engine.storage import free_bytes, is_disk_full, readable_size

OnProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all)."""


def download_base(repo: str, revision: str = "main", on_progress: OnProgress | None = None) -> Path:
    """Download what a diffusers repository needs, leave out what is cached, and return the folder.

    Without a network a complete cached copy is used. Raises HubError with a different message for an unknown id, an
    unknown revision, a gated repository without a token, a token without access, an invalid token, and no network; and
    StorageError where there is no room.
    """
    wanted = _Wanted(repo, revision, "base.model")
    return _reach(wanted, lambda: _download(repo, revision, on_progress), lambda: cached_folder(repo, revision))


def download_file(repo: str, name: str, revision: str, setting: str, on_progress: OnProgress | None = None) -> Path:
    """Download one file of a repository at the commit that `revision` is now, and return its path.

    `setting` is what the user calls it. Without a network a cached copy is used. Raises as `download_base`.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    def download() -> Path:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or []}
        if name not in sizes:
            near = [other for other in sizes if PurePosixPath(other).suffix == PurePosixPath(name).suffix]
            raise BaseModelError(
                f"{repo} has no file {name}.",
                why=f"It has {', '.join(near[:3])}{' and more' if len(near) > 3 else ''}." if near else "",
                fix=f"Check {setting}.",
            )
        folder = _fetch_all(repo, str(info.sha), [name], sizes, on_progress)
        _remember_branch(repo, revision, str(info.sha), folder)
        return folder / name

    def cached() -> Path | None:
        found = try_to_load_from_cache(repo, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    return _reach(_Wanted(repo, revision, setting), download, cached)


@dataclass(frozen=True)
class DownloadPart:
    """One part of a model on the Hub: its bytes, and those of them that are not on this machine yet."""

    name: str
    bytes: int
    missing_bytes: int


def list_download(repo: str, revision: str = "main", file: str = "") -> list[DownloadPart]:
    """Return the parts of a base model, or the one `file`, with their sizes, the largest first; downloads no weights.

    An empty list where the Hub is out of reach but the model is in the cache. Raises as `download_base`.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    found: list[DownloadPart] = []

    def ask() -> Path:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or []}
        commit = str(info.sha)
        names = [file] if file else _needed(repo, commit, sizes, hf_hub_download)
        parts: dict[str, list[int]] = {}
        for name in names:
            present = isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
            counts = parts.setdefault(name if file else name.rpartition("/")[0] or "model card and index", [0, 0])
            counts[0] += sizes.get(name, 0)
            counts[1] += 0 if present else sizes.get(name, 0)
        found.extend(DownloadPart(name, *counts) for name, counts in parts.items())
        return Path()

    _reach(_Wanted(repo, revision, "base.model"), ask, lambda: cached_folder(repo, revision))
    return sorted(found, key=lambda part: -part.bytes)


def describe_download(parts: list[DownloadPart]) -> str:
    """Return what is to be downloaded in one sentence, with the room for it; "" where nothing is."""
    from huggingface_hub import constants

    missing = [part for part in parts if part.missing_bytes]
    if not missing:
        return ""
    listed = ", ".join(f"{part.name} {readable_size(part.missing_bytes)}" for part in missing)
    total = sum(part.missing_bytes for part in missing)
    free = readable_size(free_bytes(Path(constants.HF_HUB_CACHE)))
    return f"To download: {readable_size(total)} ({listed}); {free} free in {constants.HF_HUB_CACHE}."


def download_files(
    repo: str,
    revision: str,
    choose: Callable[[list[str]], list[str]],
    is_complete: Callable[[Path], bool],
    on_progress: OnProgress | None = None,
    setting: str = "the captioner's model",
) -> Path:
    """Download the files of a repository that `choose` picks by name, and return their folder.

    `setting` is what the user calls it. Without a network a cached copy is used if `is_complete` says so. Raises as
    `download_base`.
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

    return _reach(_Wanted(repo, revision, setting), download, cached)


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


def _download(repo: str, revision: str, on_progress: OnProgress | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or []}
    commit = str(info.sha)
    folder = _fetch_all(repo, commit, _needed(repo, commit, sizes, hf_hub_download), sizes, on_progress)
    _remember_branch(repo, revision, commit, folder)
    return folder


def _needed(repo: str, commit: str, sizes: Mapping[str, int], fetch: Callable[..., str]) -> list[str]:
    """Return the files of a base model by its index, which is fetched; raises BaseModelError without one."""
    name = index_of(sizes)
    if not name:
        singles = [name for name in sizes if name.endswith(".safetensors")]
        raise BaseModelError(
            f"{repo} is not in the diffusers layout: it has no model_index.json.",
            why=f"It holds {', '.join(singles[:2])}." if singles else "",
            fix=f"Set base.model to one of its files, such as {repo}/{singles[0]}."
            if singles
            else "Choose another repository.",
        )
    index = Path(fetch(repo, name, revision=commit))
    return needed_files(sizes, json.loads(index.read_text(encoding="utf-8")), repo)


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

    indexes = [try_to_load_from_cache(repo, name, revision=revision) for name in INDEXES]
    found = next((path for path in indexes if isinstance(path, str)), None)
    if found is None:
        return None
    index = json.loads(Path(found).read_text(encoding="utf-8"))
    parts = {key for key, value in index.items() if isinstance(value, list) and value and value[0]} - SKIPPED_PARTS
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
