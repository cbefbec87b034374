"""The one registry of what a user can do in the wizard; keys, footer, palette and help are views of it.

Keys are those that arrive in every terminal and in tmux: letters, digits, F-keys, enter, escape, ctrl+letter except
those that a multiplexer or the terminal takes (ctrl+a, b, h, i, m, z).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textual.binding import Binding

Place = Literal["app", "page", "settings", "review"]


@dataclass(frozen=True)
class UserAction:
    """One thing to do: `name` is the action method, `keys` a comma-separated list, `help` one sentence for the user."""

    id: str
    place: Place
    keys: str
    name: str
    label: str
    help: str
    footer: bool = False
    priority: bool = False


ACTIONS: tuple[UserAction, ...] = (
    UserAction(
        "quit", "app", "ctrl+q", "quit", "Quit", "Leave lorasmith; the draft is kept for the next time.", True, True
    ),
    UserAction("next", "page", "enter", "next", "Next", "Accept the page and go to the next one.", True),
    UserAction("next-letter", "page", "n", "forward", "Next page", "Go to the next page."),
    UserAction("back", "page", "escape", "back", "Back", "Go to the page before; every value is kept.", True),
    UserAction("back-letter", "page", "p", "back", "Previous page", "Go to the page before."),
    UserAction(
        "help", "page", "f1,question_mark", "help", "Help", "Explain the focused field and list the keys.", True
    ),
    UserAction("steps", "page", "s", "focus_steps", "Step list", "Move to the list of steps, to visit any of them."),
    UserAction("step-number", "page", "1,2,3,4,5,6", "step", "Go to step", "Go to the step of that number."),
    UserAction("page-down", "page", "pagedown", "scroll_body(1)", "Scroll down", "Show what follows on the page."),
    UserAction("page-up", "page", "pageup", "scroll_body(-1)", "Scroll up", "Show what stands above on the page."),
    UserAction("reset", "settings", "r,ctrl+r", "reset", "Reset", "Give the field its recommended value again.", True),
    UserAction("all", "settings", "a", "toggle_all", "All settings", "Show all settings, or the important ones.", True),
    UserAction("copy", "review", "y", "copy_command", "Copy", "Copy the command that trains the same.", True),
    UserAction("copy-file", "review", "t", "copy_toml", "Copy TOML", "Copy the run file.", True),
)


def bindings(place: Place) -> list[Binding]:
    """Return the key bindings of `place`; each has an id, so that a user's keymap can move it."""
    return [_binding(action, key) for action in ACTIONS if action.place == place for key in action.keys.split(",")]


def actions_of(*places: Place) -> list[UserAction]:
    """Return the actions that can be done in `places`."""
    return [action for action in ACTIONS if action.place in places]


def _binding(action: UserAction, key: str) -> Binding:
    keys = action.keys.split(",")
    name = f"{action.name}({key})" if action.name == "step" else action.name
    suffix = "" if key == keys[0] else f"-{key}"
    return Binding(
        key,
        name,
        action.label,
        show=action.footer and key == keys[0],
        priority=action.priority,
        tooltip=action.help,
        id=f"{action.id}{suffix}",
    )
