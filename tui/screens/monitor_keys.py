"""The monitor's keys; each has an id, so that a user's keymap can move it."""

from __future__ import annotations

from textual.binding import Binding

KEYS = (
    Binding("p", "pause_or_resume", "Pause", id="monitor.pause"),
    Binding("s", "save_now", "Save", id="monitor.save"),
    Binding("v", "preview_now", "Preview", id="monitor.preview"),
    Binding("k", "park", "Park", id="monitor.park"),
    Binding("x", "stop", "Stop", id="monitor.stop"),
    Binding("space", "pause_charts", "Charts", id="monitor.charts"),
    Binding("l", "log_y", "Log y", show=False, id="monitor.log_y"),
    Binding("left_square_bracket", "smooth(-1)", "Smooth less", show=False, id="monitor.smooth_less"),
    Binding("right_square_bracket", "smooth(1)", "Smooth more", show=False, id="monitor.smooth_more"),
    Binding("z", "window", "Window", show=False, id="monitor.window"),
    Binding("n", "levels", "Noise levels", show=False, id="monitor.levels"),
    Binding("left", "browse(-1, 0)", "Earlier preview", show=False, id="monitor.earlier"),
    Binding("right", "browse(1, 0)", "Later preview", show=False, id="monitor.later"),
    Binding("up", "browse(0, -1)", "Previous prompt", show=False, id="monitor.prompt_before"),
    Binding("down", "browse(0, 1)", "Next prompt", show=False, id="monitor.prompt_after"),
    Binding("y", "copy_path", "Copy path", show=False, id="monitor.copy"),
    Binding("f1,question_mark", "help", "Help", id="monitor.help", key_display="F1"),
    Binding("enter,q", "leave", "Leave", id="monitor.leave", key_display="q"),
    Binding("ctrl+q", "request_quit", "Quit", id="monitor.quit"),
)
