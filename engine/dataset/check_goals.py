"""What a goal asks of a dataset: how many pictures, and what must and must not be in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Aim:
    """What a goal of the presets asks of its pictures.

    `few` is the smallest number that the guides name for it, `usual` their range, `many` more than one LoRA of the
    usual size takes in. `words` explain the goal where it is chosen, `captions` what captions leave out for it, and
    `by_sides` tells whether left and right matter. `blurs`, `uniform` and `shared` end sentences about what blur,
    sameness and a tag in every caption do. Sources: guide [A], "Train an Image LoRA Locally (2026): Kohya, SDXL &
    FLUX"; guide [B], "How to Train a Custom LoRA for Flux and SDXL with Kohya SS, AI-Toolkit, and fal.ai in 2026".
    """

    what: str
    words: str
    few: int
    usual: tuple[int, int]
    many: int
    blurs: str
    uniform: str
    shared: str
    captions: str
    by_sides: bool = False


_CHARACTER = Aim(
    "a character",
    words="a character: one person, animal or figure that is to be recognized everywhere",
    few=10,  # [A] "a character LoRA can train on as few as 10 good images"
    usual=(15, 30),  # [B] "Characters need 15-30 varied poses and lighting"
    many=200,  # a judgement
    blurs="the character comes out soft, faces first",
    uniform="the pose, the light or the background that all share is drawn whenever the trigger is",
    shared="what it says of the character stays bound to those words, and the trigger alone does not bring it",
    captions="Say what changes, such as pose, clothes and place; leave out what always belongs to the character.",
    by_sides=True,
)
_STYLE = Aim(
    "a style",
    words="a style: how pictures are made, whatever they show",
    few=15,  # [A] "a style LoRA usually wants 15-30 to capture range"
    usual=(30, 50),  # [B] "styles need 30-50 mood-consistent images"
    many=1000,  # a judgement
    blurs="blur becomes part of the style",
    uniform="what all show is learnt as if it were the style, and is drawn with it",
    shared="the style stays bound to those words, and the trigger alone does not bring it",
    captions="Say what each picture shows; leave out how it is painted or lit, which the trigger is to stand for.",
)
_PRODUCT = Aim(
    "a product",
    words="a product: one thing with its exact shape, material and lettering",
    few=10,  # a judgement; [A] names 15-25 for products
    usual=(15, 25),  # [A] "15-25 clean shots of the product", from several angles
    many=200,  # a judgement
    blurs="the product comes out without its fine parts and lettering",
    uniform="the angle and the background that all share are drawn whenever the trigger is",
    shared="what it says of the product stays bound to those words, and the trigger alone does not bring it",
    captions="Say angle, background and light; leave out the shape, color and lettering of the product itself.",
    by_sides=True,
)
_CONCEPT = Aim(
    "a concept",
    words="a concept: a pose, a kind of dress, place or effect that many can have",
    few=15,  # a judgement: as for a style, since what varies has to be shown
    usual=(20, 50),  # a judgement
    many=500,  # a judgement
    blurs="blur becomes part of the concept",
    uniform="what all share besides the concept is learnt as part of it",
    shared="the concept stays bound to those words, and the trigger alone does not bring it",
    captions="Say who and what is in each picture; leave out what all have in common.",
)
_ANY = Aim(
    "a LoRA",
    words="anything",
    few=10,  # the smallest of the above
    usual=(15, 50),  # [B] "15-50 high-quality images of your subject or style"
    many=1000,  # the largest of the above
    blurs="what is learnt comes out soft",
    uniform="what all share is learnt as part of the concept",
    shared="what it says stays bound to those words, and the trigger alone does not bring it",
    captions="Say what changes from picture to picture; leave out what the trigger is to stand for.",
)
_AIMS = {"character": _CHARACTER, "style": _STYLE, "product": _PRODUCT, "concept": _CONCEPT}


def aim_of(goal: str) -> Aim:
    """Return what a goal asks for; an unknown one, and "", ask for what all have in common."""
    return _AIMS.get(goal, _ANY)
