"""Downloading base models from the Hugging Face Hub, and telling apart why it fails. Torch-free.

Only the files that a diffusers folder needs are taken: configurations, tokenizers and safetensors weights, no pickles
and no safety checker. Tokens come from the Hub's own store or HF_TOKEN and appear in no message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from lorasmith.engine.errors import BaseModelError, HubError
from lorasmith.engine.safetensors_header import PICKLE_FIX, PICKLE_SUFFIXES

OnProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all)."""
_SKIPPED_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}
_TEXT_SUFFIXES = (".json", ".txt", ".model")
_PLAIN_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FP16_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.fp16(-\d{5}-of-\d{5})?|-\d{5}-of-\d{5}\.fp16)\.safetensors"
    r"|(model|diffusion_pytorch_model)\.(fp16\.safetensors\.index|safetensors\.index\.fp16)\.json"
)


def download_base(repo: str, revision: str = "main", on_progress: OnProgress | None = None) -> Path:
    """Download what a diffusers repository needs, leave out what is cached, and return the folder.

    Without a network a complete cached copy is used. Raises HubError with a different message for an unknown id, an
    unknown revision, a gated repository without a token, a token without access, an invalid token, and no network.
    """
    import httpx2
    from huggingface_hub import errors

    try:
        return _download(repo, revision, on_progress)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.TransportError, TimeoutError) as error:
        cached = cached_folder(repo, revision)
        if cached is not None:
            return cached
        # A file that the Hub refuses is reported as one that is not in the cache either.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _explain(error.__cause__, repo, revision) from None
        raise HubError(
            f"The Hub cannot be reached, and {repo} is not complete in the cache.",
            why="This machine is offline, or HF_HUB_OFFLINE is set.",
            fix="Connect to the network, or set base.model to a folder or file on this machine.",
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise _explain(error, repo, revision) from None


def needed_files(names: Iterable[str], index: dict[str, Any], repo: str) -> list[str]:
    """Choose the files of a repository to download; `index` is its model_index.json.

    Plain weights are preferred to the fp16 variant. Raises BaseModelError where a part has pickled weights only.
    """
    all_names = list(names)
    # The card names the license.
    chosen = ["model_index.json", *(name for name in all_names if name == "README.md")]
    parts = [key for key, value in index.items() if isinstance(value, list) and value and value[0]]
    for part in sorted(set(parts) - _SKIPPED_PARTS):
        inside = [name for name in all_names if PurePosixPath(name).parent == PurePosixPath(part)]
        chosen += _part_files(part, inside, repo)
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
            f"{repo} has its {part} only as a pickle, {pickles[0]}.",
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

    def fetch(name: str, bar: Any = None) -> Path:
        # The commit, not the branch: all files come from one version.
        return Path(hf_hub_download(repo, name, revision=info.sha, tqdm_class=bar))

    index = fetch("model_index.json")
    files = needed_files(sizes, json.loads(index.read_text(encoding="utf-8")), repo)
    total, done = sum(sizes.get(name, 0) for name in files), 0
    for name in files:
        fetch(name, _silent_bar(on_progress, name, done, total))
        done += sizes.get(name, 0)
        if on_progress is not None:
            on_progress(name, done, total)
    _remember_branch(repo, revision, str(info.sha), index.parent)
    return index.parent


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


def _explain(error: Exception, repo: str, revision: str) -> HubError:
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{repo}"
    has_token = get_token() is not None
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return _gated(repo, page, has_token)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision}.", fix="Check base.revision; main is the usual one.")
    if isinstance(error, errors.RepositoryNotFoundError):
        why = "There is no such repository, or it is private and your token may not read it."
        if not has_token:
            why = "There is no such repository, or it is private: no Hub token is set."
        return HubError(f"The Hub does not know {repo}.", why=why, fix="Check base.model for a typing error.")
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
