"""How much: pictures, steps, ranks, resolutions, and how often something is kept."""

from __future__ import annotations

from collections.abc import Callable

from lorasmith.engine.dataset.check_goals import aim_of
from lorasmith.engine.foot_guns._case import Case, FootGun

FEWER, MORE = 0.4, 2.5
"""Steps outside of these shares of the recommended ones are out of range; a judgement."""
LARGE_RANK, PICTURES_OF_LARGE_RANK = 128, 200
"""Guide 004_e8928f8a8030cd39.txt: rank 128 often overfits with fewer pictures."""
ENLARGED = 1.5
"""Above this multiple of its own resolution a base draws things twice; a judgement."""
LONG_WARMUP = 0.3
EMA_SHARE = 3.0
"""An average is too slow where it reaches over more than one part in this many of the run; a judgement."""
WORTH_KEEPING = 500
"""Shorter runs are tried out and need one checkpoint; a judgement."""

PREVIEW_SHARE = 1.0
"""Previews are worth at most as much time as the training; a judgement."""
STEP_FORWARDS = 3
"""A step computes each picture forward once and backward, which takes twice as long."""


def _pictures_few(case: Case) -> FootGun | None:
    aim, count = aim_of(case.around.goal), case.num_pictures
    if not case.preset or count is None or not 0 < count < aim.few:
        return None
    only = "One picture is" if count == 1 else f"{count} pictures are"
    return FootGun(
        "pictures-few",
        f"{only} few for {aim.what}: what they show by chance is learnt as well.",
        {},
        f"Add some until there are {aim.few} or more; {aim.usual[0]} to {aim.usual[1]} different ones are usual.",
    )


def _pictures_many(case: Case) -> FootGun | None:
    aim, count = aim_of(case.around.goal), case.num_pictures
    if not case.preset or count is None or count <= aim.many:
        return None
    return FootGun(
        "pictures-many",
        f"{count:,} pictures are many for {aim.what}: a LoRA of the usual size takes in their average.",
        {},
        f"Keep the best {aim.many:,} or fewer; {aim.usual[0]} to {aim.usual[1]} different ones are usual.",
    )


def _steps_many(case: Case) -> FootGun | None:
    wanted = case.recommended_steps() if case.num_pictures else []
    if not wanted or case.config.train.steps <= MORE * max(wanted):
        return None
    return FootGun(
        "steps-many",
        f"{_views(case)}, far more often than needed: they are learnt by heart and drawn again.",
        {"train.steps": wanted[0]},
        f"Set train.steps to {wanted[0]}.",
    )


def _steps_few(case: Case) -> FootGun | None:
    wanted = case.recommended_steps() if case.num_pictures else []
    if not wanted or case.config.train.steps >= FEWER * min(wanted):
        return None
    return FootGun(
        "steps-few",
        f"{_views(case)}: too little for the LoRA to show anything.",
        {"train.steps": wanted[0]},
        f"Set train.steps to {wanted[0]}.",
    )


def _views(case: Case) -> str:
    pictures = case.num_pictures or 1
    views = case.config.train.steps * case.pictures_per_step / pictures
    each = "the picture" if pictures == 1 else f"each of the {pictures} pictures"
    return f"In {case.config.train.steps} steps {each} is seen about {max(1, round(views)):,} times"


def _batch_large(case: Case) -> FootGun | None:
    train, count = case.config.train, case.num_pictures
    if not count or case.pictures_per_step <= count:
        return None
    batch = min(train.batch_size, count)
    return FootGun(
        "batch-large",
        f"A step sees {case.pictures_per_step} pictures and there are {count}: every step averages over all of them, "
        "which takes time and teaches nothing more.",
        {"train.batch_size": batch, "train.gradient_accumulation": 1},
        f"Set train.batch_size to {batch} and train.gradient_accumulation to 1.",
    )


def _rank_large(case: Case) -> FootGun | None:
    adapter, count, usual = case.config.adapter, case.num_pictures, case.usual("adapter.rank")
    if count is None or usual is None or adapter.rank < LARGE_RANK or count >= PICTURES_OF_LARGE_RANK:
        return None
    alpha = adapter.alpha * usual / adapter.rank
    return FootGun(
        "rank-large",
        f"Rank {adapter.rank} has room to learn {count} pictures by heart, and makes a file {adapter.rank // usual} "
        "times as large.",
        {"adapter.rank": usual, "adapter.alpha": alpha},
        f"Set adapter.rank to {usual} and adapter.alpha to {alpha:g}, which keeps the scale.",
    )


def _resolution_low(case: Case) -> FootGun | None:
    entry, dataset = case.advice.get("resolution_floor"), case.config.dataset
    largest = max([dataset.resolution, *dataset.more_resolutions])
    if entry is None or largest >= min(entry["value"], case.native):
        return None
    floor = min(entry["value"], case.native // 64 * 64)
    return FootGun(
        "resolution-low",
        f"At {largest} pixels {case.base} draws broken pictures, and the LoRA learns from them.",
        {"dataset.resolution": floor},
        f"Set dataset.resolution to {floor} or more; the base was trained at {case.native}.",
    )


def _resolution_high(case: Case) -> FootGun | None:
    largest = max([case.config.dataset.resolution, *case.config.dataset.more_resolutions])
    if not case.preset or largest <= ENLARGED * case.native:
        return None
    side = max(64, case.native // 64 * 64)
    kept = [each for each in case.config.dataset.more_resolutions if each <= ENLARGED * case.native]
    return FootGun(
        "resolution-high",
        f"The base was trained at {case.native} pixels; at {largest} it draws things twice, and a step takes "
        f"{(largest / case.native) ** 2:.1f} times the memory.",
        {"dataset.resolution": min(case.config.dataset.resolution, side), "dataset.more_resolutions": kept},
        f"Set dataset.resolution to {side}, and take larger ones out of dataset.more_resolutions.",
    )


def _warmup_long(case: Case) -> FootGun | None:
    warmup, steps = case.config.schedule.warmup_steps, case.config.train.steps - case.config.schedule.start_step
    if warmup <= LONG_WARMUP * steps:
        return None
    shorter = max(1, steps // 20)
    return FootGun(
        "warm-up-long",
        f"The learning rate rises over {warmup} of {steps} steps, so that little is left of the run at the full rate.",
        {"schedule.warmup_steps": shorter},
        f"Set schedule.warmup_steps to {shorter}, a twentieth of the run.",
    )


def _average_slow(case: Case) -> FootGun | None:
    decay, steps = case.config.train.ema_decay, case.config.train.steps
    if not decay or 1 / (1 - decay) <= steps / EMA_SHARE:
        return None
    quicker = max(0.0, round(1 - 10 / steps, 3))
    return FootGun(
        "average-slow",
        f"train.ema_decay = {decay:g} averages over about {1 / (1 - decay):,.0f} steps and the run has {steps}: the "
        "file holds what the LoRA was at its beginning.",
        {"train.ema_decay": quicker},
        f"Set train.ema_decay to {quicker:g}, or to 0.",
    )


def _kept_once(case: Case) -> FootGun | None:
    checkpoints, steps = case.config.checkpoints, case.config.train.steps
    several = 0 < checkpoints.every <= steps / 2 and checkpoints.keep > 1
    if several or steps < WORTH_KEEPING:
        return None
    every = max(1, steps // 5)
    return FootGun(
        "kept-once",
        "Only the last state of the LoRA is kept, and the best one is rarely the last.",
        {"checkpoints.every": every, "checkpoints.keep": 5},
        f"Set checkpoints.every to {every} and checkpoints.keep to 5.",
    )


def _previews_long(case: Case) -> FootGun | None:
    previews, steps = case.config.previews, case.config.train.steps
    one, training = _forwards_of_preview(case), STEP_FORWARDS * steps * case.pictures_per_step
    if not case.preset or not previews.every or steps // previews.every * one <= PREVIEW_SHARE * training:
        return None
    times = int(PREVIEW_SHARE / 2 * training / one)
    every = -(-steps // times) if times else 0
    pictures = max(1, len(previews.prompts)) * len(set(previews.seeds))
    return FootGun(
        "previews-long",
        f"{steps // previews.every} previews of {pictures} picture{'s' if pictures > 1 else ''} take about "
        f"{steps // previews.every * one / training:.1f} times as long as the training itself.",
        {"previews.every": every},
        f"Set previews.every to {every}{'' if every else ', which is never'}, or draw fewer prompts, seeds or "
        "previews.steps.",
    )


def _forwards_of_preview(case: Case) -> int:
    """Return how often the denoiser runs for one preview, in pictures."""
    previews = case.config.previews
    details = case.identity.details if case.identity is not None else {}
    steps = previews.steps or int(details.get("draw_steps", case.spec.draw_steps))
    guidance = previews.guidance or float(details.get("draw_guidance", case.spec.draw_guidance))
    # A base with built-in guidance, which presets then name, draws in one run a step; others in two.
    runs = 2 if guidance > 1 and case.usual("objective.guidance") is None else 1
    return max(1, len(previews.prompts)) * len(set(previews.seeds)) * steps * runs


ROWS: tuple[Callable[[Case], FootGun | None], ...] = (
    _pictures_few,
    _pictures_many,
    _steps_many,
    _steps_few,
    _batch_large,
    _rank_large,
    _resolution_low,
    _resolution_high,
    _warmup_long,
    _average_slow,
    _kept_once,
    _previews_long,
)
