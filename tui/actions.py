"""The one registry of what a user can do in the wizard; keys, footer, palette and help are views of it.

Keys are those that arrive in every terminal and in tmux: letters, digits, F-keys, enter, escape, ctrl+letter except
those that a multiplexer or the terminal takes (ctrl+a, b, h, i, m, z).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textual.binding import Binding

Place = Literal[
    "app",
    "page",
    "dataset",
    "settings",
    "review",
    "sheet",
    "findings",
    "gallery",
    "tool",
    "captions",
    "bulk",
    "tags",
    "captioner",
    "runs",
]


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
    UserAction("runs", "page", "f7", "runs", "Runs", "List earlier runs: resume, watch, extend, rename, delete."),
    UserAction("page-down", "page", "pagedown", "scroll_body(1)", "Scroll down", "Show what follows on the page."),
    UserAction("page-up", "page", "pageup", "scroll_body(-1)", "Scroll up", "Show what stands above on the page."),
    UserAction("findings", "dataset", "f", "findings", "Findings", "Show what was found, with the pictures.", True),
    UserAction("gallery", "dataset", "g", "gallery", "Gallery", "Show all pictures.", True),
    UserAction("captions", "dataset", "c", "captions", "Captions", "Edit the captions.", True),
    UserAction("more", "dataset", "m", "more_settings", "More settings", "Show more settings of the dataset."),
    UserAction("sheet-back", "sheet", "escape", "back", "Back", "Go back to the page.", True),
    UserAction("sheet-help", "sheet", "f1,question_mark", "help", "Help", "Explain this and list the keys.", True),
    UserAction("finding-apply", "findings", "a", "apply", "Do it", "Make the change that the finding proposes.", True),
    UserAction("finding-gallery", "findings", "g", "gallery", "Gallery", "Show these pictures in the gallery.", True),
    UserAction("picture-exclude", "sheet", "x", "exclude", "Leave out", "Leave the selected picture out.", True),
    UserAction("picture-edit", "sheet", "e", "edit_caption", "Caption", "Edit the selected picture's caption.", True),
    UserAction("sheet-undo", "sheet", "u", "undo", "Undo", "Take the newest change back.", True),
    UserAction("gallery-filter", "gallery", "slash", "filter", "Filter", "Find by name, caption or finding.", True),
    UserAction(
        "gallery-unused", "gallery", "t", "toggle_unused", "Not used", "List the files not used, and why.", True
    ),
    UserAction("reset", "settings", "r,ctrl+r", "reset", "Reset", "Give the field its recommended value again.", True),
    UserAction("all", "settings", "a", "toggle_all", "All settings", "Show all settings, or the important ones.", True),
    UserAction("mend", "settings", "f", "mend", "Fix", "Make the change that the warning proposes.", True),
    UserAction("copy", "review", "y", "copy_command", "Copy", "Copy the command that trains the same.", True),
    UserAction("copy-file", "review", "t", "copy_toml", "Copy TOML", "Copy the run file.", True),
    UserAction(
        "queue", "review", "a", "add_to_queue", "Add to queue", "Have `lorasmith queue run` train it later.", True
    ),
    UserAction("measure", "review", "m", "measure", "Measure", "Try each stage once: memory and time, measured.", True),
    UserAction("in-tmux", "review", "x", "in_tmux", "Start inside tmux", "Go on inside tmux, where SSH may drop."),
    UserAction("close", "tool", "escape", "close", "Back", "Go back; what was edited is kept.", True),
    UserAction("tool-help", "tool", "f1,question_mark", "help", "Help", "Explain this screen and list its keys.", True),
    UserAction("picture-next", "captions", "pagedown,n", "picture(1)", "Next", "Keep this caption, go on.", True),
    UserAction(
        "picture-before", "captions", "pageup,p", "picture(-1)", "Previous", "Keep this caption, go back.", True
    ),
    UserAction("caption-filter", "captions", "slash", "filter", "Filter", "Find pictures by name or caption.", True),
    UserAction("caption-show", "captions", "m", "cycle_show", "Show", "Only those missing, edited, over the limit …"),
    UserAction("caption-keep", "captions", "ctrl+s", "keep", "Save", "Save this caption now."),
    UserAction("caption-own", "captions", "r,ctrl+r", "own_text", "Own text", "Take the file's own caption.", True),
    UserAction("caption-undo", "captions", "u,f8", "undo", "Undo", "Take the last saved change back.", True),
    UserAction(
        "caption-other", "captions", "c,f9", "other", "Next caption", "Edit the picture's next caption, if any."
    ),
    UserAction("caption-bulk", "captions", "b", "bulk", "Bulk edit", "Change many captions at once."),
    UserAction("caption-tags", "captions", "t", "tags", "Tags", "Count the tags, and find pictures by them."),
    UserAction("caption-auto", "captions", "a", "auto", "Auto-caption", "Have a model write captions."),
    UserAction("caption-write", "captions", "w", "write", "Write to files", "Write the edits to your caption files."),
    UserAction("bulk-apply", "bulk", "ctrl+s", "apply", "Apply", "Make the change in all captions listed.", True),
    UserAction("bulk-undo", "bulk", "u,f8", "undo", "Undo", "Take the last change back, all of it.", True),
    UserAction("tag-filter", "tags", "slash", "filter", "Filter", "Find tags by their letters.", True),
    UserAction("tag-pictures", "tags", "enter", "pictures", "Pictures", "Show the pictures with this tag.", True),
    UserAction("tag-remove", "tags", "d", "remove", "Remove", "Take this tag out of all captions; asks first.", True),
    UserAction("tag-rename", "tags", "r", "rename", "Rename", "Give this tag another name in all captions.", True),
    UserAction("captioner-start", "captioner", "ctrl+s", "start", "Start", "Write captions with this model.", True),
    UserAction("captioner-stop", "captioner", "x", "stop", "Stop", "Stop after this picture; all written stay.", True),
    UserAction("run-open", "runs", "enter", "open", "Resume or watch", "Go on with the run, or watch it.", True),
    UserAction("run-extend", "runs", "e", "extend", "Extend", "Plan more steps; says first what changes.", True),
    UserAction("run-rename", "runs", "n", "rename", "Rename", "Give the run another name.", True),
    UserAction("run-delete", "runs", "d", "delete", "Delete", "Delete the run for ever; asks first.", True),
    UserAction("run-reload", "runs", "r", "reload", "Look again", "Look at the runs again.", True),
    UserAction("runs-back", "runs", "escape,f7", "back", "Back", "Go back to the page.", True),
    UserAction("runs-help", "runs", "f1,question_mark", "help", "Help", "Explain this and list the keys.", True),
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
