"""The Hub: whether it is reached, whether the token is valid, and which models that ask for consent may be read.

Asked only when the user wants it; lorasmith sends nothing anywhere by itself.
"""

from __future__ import annotations

import email.utils
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lorasmith.engine.doctor.check import Check
from lorasmith.engine.families import families
from lorasmith.engine.run_log import plain_text

if TYPE_CHECKING:
    from concurrent.futures import Future

HUB_SECONDS: Final = 5.0
GATED_SECONDS: Final = 10.0
CLOCK_SLACK_SECONDS: Final = 300.0
_ASKED_AT_ONCE: Final = 8


def models_folder() -> Path:
    """Return where downloaded models are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def check_hub() -> Check:
    """The Hub answers, and its clock is this machine's."""
    from huggingface_hub import constants, get_session

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        meaning = "Only models that are already on this machine can be used."
        return Check("hub", "warn", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE", meaning)
    try:
        answer = get_session().head(address, timeout=HUB_SECONDS, follow_redirects=True)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        fix = f"curl -I {address}   # behind a proxy: export HTTPS_PROXY=http://…"
        meaning = "Base models that are already on this machine work without it."
        return Check("hub", "warn", plain_text(f"{address} cannot be reached: {lines[0]}"), fix, meaning)
    off = _clock_difference(answer.headers.get("date", ""))
    if abs(off) > CLOCK_SLACK_SECONDS:
        detail = (
            f"{address} answers; this machine's clock is {abs(off) / 60:.0f} min {'ahead' if off > 0 else 'behind'}"
        )
        meaning = "Encrypted connections and tokens may be refused."
        return Check("hub", "warn", detail, "sudo timedatectl set-ntp true", meaning)
    return Check("hub", "pass", f"{address} answers ({answer.status_code})")


def _clock_difference(date: str) -> float:
    """Return by how many seconds this machine's clock is ahead of a Date header; 0 where there is none."""
    try:
        return time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return 0.0


def check_hub_token() -> Check:
    """There is a token, and the Hub knows whose it is."""
    from huggingface_hub import HfApi, errors, get_token

    name = "hub token"
    if get_token() is None:
        meaning = "Models that ask for consent to their license cannot be downloaded; the others can."
        return Check(name, "warn", "no token", "hf auth login", meaning)
    try:
        owner = HfApi().whoami()
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 401:
            meaning = "Even models that are free for all are refused with it."
            return Check(
                name, "warn", "the Hub does not accept the token: invalid or expired", "hf auth login", meaning
            )
        meaning = "Whether models can be downloaded is not known."
        return Check(name, "warn", f"the Hub answered with an error {status}", "Try again later.", meaning)
    except Exception as error:
        return Check(name, "skip", f"there is one; the Hub cannot be asked ({type(error).__name__})")
    return Check(name, "pass", f"valid, of {plain_text(str(owner.get('name', 'somebody')))}")


def check_gated_models() -> Check:
    """Which base models that lorasmith suggests this account may download."""
    # Its import fails in a thread that outlives the main one, and a run's thread imports this package.
    from concurrent.futures import ThreadPoolExecutor, wait

    name = "gated models"
    asked = [repo for module in families().values() for repo in module.SPEC.hub_ids]
    pool = ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="hub")
    futures = {repo: pool.submit(_refusal, repo) for repo in asked}
    wait(futures.values(), GATED_SECONDS)
    pool.shutdown(wait=False, cancel_futures=True)
    refused = {repo: _answer(future) for repo, future in futures.items()}
    gated = [repo for repo, reason in refused.items() if reason == "gated"]
    silent = [repo for repo, reason in refused.items() if reason not in ("", "gated")]
    readable = len(asked) - len(gated) - len(silent)
    detail = f"{readable} of {len(asked)} suggested base models can be downloaded"
    if len(silent) == len(asked):
        return Check(name, "skip", f"the Hub cannot be asked ({refused[silent[0]]})")
    if silent:
        detail += f"; no answer for {', '.join(silent)}"
    if gated:
        detail += f"; consent is missing for {', '.join(gated)}"
        fix = f"Accept the license at https://huggingface.co/{gated[0]}, then: hf auth login"
        return Check(name, "warn", detail, fix, "Training on these needs their owner's license accepted first.")
    if silent:
        return Check(name, "warn", detail, "Try again later.", "These may not be downloadable now.")
    return Check(name, "pass", detail)


def _refusal(repo: str) -> str:
    """Return "" where `repo` may be downloaded, "gated" where consent is missing, else what went wrong."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().auth_check(repo)
    except errors.GatedRepoError:
        return "gated"
    except Exception as error:
        return type(error).__name__
    return ""


def _answer(future: Future[str]) -> str:
    return future.result() if future.done() and not future.cancelled() else "no answer"
