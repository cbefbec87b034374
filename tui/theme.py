"""Colors: one theme of ours, and the terminal's own sixteen colors where there are no more or none are wanted."""

from __future__ import annotations

from collections.abc import Mapping

from textual.theme import Theme

THEME = Theme(
    name="lorasmith",
    primary="#7aa2f7",
    secondary="#9ece6a",
    accent="#e0af68",
    foreground="#d5d8e0",
    background="#14161c",
    surface="#1b1e26",
    panel="#252a35",
    success="#9ece6a",
    warning="#e0af68",
    error="#f7768e",
    dark=True,
)
_RICH_TERMS = ("256color", "direct", "kitty", "alacritty", "foot", "ghostty", "wezterm", "contour", "iterm")


def limited_colors(environment: Mapping[str, str]) -> bool:
    """Whether only the terminal's own colors may be used: NO_COLOR is set, or the terminal has no more than sixteen."""
    if "NO_COLOR" in environment:
        return True
    if environment.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return False
    term = environment.get("TERM", "")
    return bool(term) and not any(name in term for name in _RICH_TERMS)
