"""What a terminal would show of a screen, as a PNG: a grid of cells, written as SVG and drawn by resvg."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import resvg_py
from rich.color import Color
from rich.style import Style
from textual.strip import Strip

CELL_WIDTH, CELL_HEIGHT, MARGIN = 10.0, 20.0, 12.0
FONT_SIZE = 16.6
"""A letter of DejaVu Sans Mono is 0.602 of it wide: one cell."""
BASELINE = 15.0

Rgb = tuple[int, int, int]


def save_png(strips: Sequence[Strip], path: Path, foreground: str, background: str) -> None:
    """Draw `strips`, one a row, with these colors (#rrggbb) where a cell has none of its own."""
    plain = (_rgb(Color.parse(foreground)), _rgb(Color.parse(background)))
    columns = max(strip.cell_length for strip in strips)
    width, height = columns * CELL_WIDTH + 2 * MARGIN, len(strips) * CELL_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="DejaVu Sans Mono" font-size="{FONT_SIZE}">',
        _rectangle(0, 0, width, height, plain[1]),
    ]
    for row, strip in enumerate(strips):
        column = 0
        for segment in strip:
            if segment.text and not segment.control:
                x, y = MARGIN + column * CELL_WIDTH, MARGIN + row * CELL_HEIGHT
                parts += _draw(segment.text, segment.style or Style.null(), x, y, plain)
                column += segment.cell_length
    svg = "".join([*parts, "</svg>"])
    path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, font_family="DejaVu Sans Mono")))


def _draw(text: str, style: Style, x: float, y: float, plain: tuple[Rgb, Rgb]) -> list[str]:
    front, back = (
        _rgb(color) if color is not None and not color.is_default else default
        for color, default in zip((style.color, style.bgcolor), plain, strict=True)
    )
    if style.reverse:
        front, back = back, front
    if style.dim:
        front = _between(front, back)
    parts = [_rectangle(x, y, len(text) * CELL_WIDTH, CELL_HEIGHT, back)] if back != plain[1] else []
    letters = []
    for index, letter in enumerate(text):
        left = x + index * CELL_WIDTH
        block = _block(letter)
        if block is not None:
            parts.append(_rectangle(left, y + block[0] * CELL_HEIGHT, CELL_WIDTH, block[1] * CELL_HEIGHT, front))
        elif letter.strip():
            letters.append((left, letter))
    if letters:
        places = " ".join(f"{left:g}" for left, _ in letters)
        weight = ' font-weight="bold"' if style.bold else ""
        line = ' text-decoration="underline"' if style.underline else ""
        words = escape("".join(letter for _, letter in letters))
        parts.append(f'<text x="{places}" y="{y + BASELINE:g}" fill="{_hex(front)}"{weight}{line}>{words}</text>')
    return parts


def _block(letter: str) -> tuple[float, float] | None:
    """Return top and height of a block character as shares of the cell: fonts leave gaps between such cells."""
    if letter == "▀":
        return 0.0, 0.5
    if "▁" <= letter <= "█":
        share = (ord(letter) - ord("▁") + 1) / 8
        return 1 - share, share
    return None


def _rectangle(x: float, y: float, width: float, height: float, color: Rgb) -> str:
    sizes = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {sizes} fill="{_hex(color)}" shape-rendering="crispEdges"/>'


def _rgb(color: Color) -> Rgb:
    return tuple(color.get_truecolor())  # type: ignore[return-value]


def _between(one: Rgb, other: Rgb) -> Rgb:
    return tuple((a + b) // 2 for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _hex(color: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
