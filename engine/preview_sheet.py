"""Pictures side by side on one sheet: how the previews of a run changed from step to step. Torch-free."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.storage import atomic_write

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

SHEET_NAME = "sheet.png"
MAX_SHEET_PIXELS = 40_000_000
MIN_SIDE = 64
READABLE_SIDE = 192
MAX_COLUMNS = 8
CAPTION_HEIGHT, LINE_HEIGHT, GAP, FONT_SIZE = 18, 15, 6, 12
_PREVIEW_NAME = re.compile(r"step-(?P<step>\d{8,})_p(?P<prompt>\d+)_s(?P<seed>\d+)\.png")


@dataclass(frozen=True)
class Cell:
    """A place on a sheet: a picture at its size there, or the `reason` why there is none, above `lines` of text.

    The first line is a name; further ones, in red, say what is wrong. Pictures stand right above their lines.
    """

    picture: Image.Image | None
    lines: tuple[str, ...] = ()
    reason: str = ""


def build_sheet(
    paths: Sequence[Path | None],
    labels: Sequence[str] = (),
    target: Path | None = None,
    columns: int | None = None,
    max_pixels: int = MAX_SHEET_PIXELS,
) -> Path:
    """Write a grid of pictures, each above its label, as PNG and return its path; None leaves a place empty.

    `target` is `sheet.png` beside the first picture by default; `columns` about the square root of their number.
    Pictures are shrunk until the sheet has about `max_pixels`; tiny ones are enlarged to about `READABLE_SIDE`.
    Raises ValueError without pictures or with a different number of labels.
    """
    from lorasmith.engine.dataset.images import open_image

    given = [path for path in paths if path is not None]
    if not given or (labels and len(labels) != len(paths)):
        raise ValueError(f"{len(given)} pictures and {len(labels)} labels make no sheet")
    side = max(MIN_SIDE, math.isqrt(max_pixels // len(paths)))
    cells: list[Cell] = []
    for index, path in enumerate(paths):
        picture = None if path is None else scaled(open_image(path), side)
        cells.append(Cell(picture, (labels[index],) if labels and path is not None else ()))
    target = target or given[0].parent / SHEET_NAME
    atomic_write(target, png_bytes(draw_sheet(cells, columns), {}))
    return target


def draw_sheet(cells: Sequence[Cell], columns: int | None = None) -> Image.Image:
    """Return the cells as a grid of `columns`, by default about the square root of their number."""
    from PIL import Image, ImageDraw

    columns = columns or min(MAX_COLUMNS, math.ceil(math.sqrt(len(cells))))
    width = max((cell.picture.width for cell in cells if cell.picture is not None), default=READABLE_SIDE)
    height = max((cell.picture.height for cell in cells if cell.picture is not None), default=READABLE_SIDE)
    lines = max(len(cell.lines) for cell in cells)
    row_height = height + lines * LINE_HEIGHT + (CAPTION_HEIGHT - LINE_HEIGHT if lines else 0)
    size = (columns * (width + GAP) + GAP, math.ceil(len(cells) / columns) * (row_height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        x, y = GAP + index % columns * (width + GAP), GAP + index // columns * (row_height + GAP)
        if cell.picture is not None:
            sheet.paste(cell.picture, (x, y + height - cell.picture.height))  # right above its label
        elif cell.reason:
            pen.rectangle((x, y, x + width - 1, y + height - 1), outline="#b00000")
            _write_wrapped(pen, cell.reason, (x + GAP, y + GAP), width - 2 * GAP)
        for number, line in enumerate(cell.lines):
            color = "black" if number == 0 else "#b00000"
            text = _fitting(drawable(line), _label_font(), width)
            pen.text((x, y + height + 2 + number * LINE_HEIGHT), text, fill=color, font=_label_font())
    return sheet


def build_run_sheet(folder: Path) -> Path | None:
    """Write all previews of a run to `folder`/sheet.png, a row for each step and a column for each prompt and seed.

    Returns None where there are no previews.
    """
    found = {
        (int(match["step"]), int(match["prompt"]), int(match["seed"])): path
        for path in folder.iterdir()
        if (match := _PREVIEW_NAME.fullmatch(path.name))
    }
    if not found:
        return None
    columns = sorted({(prompt, seed) for _, prompt, seed in found})
    cells = [(step, prompt, seed) for step in sorted({step for step, _, _ in found}) for prompt, seed in columns]
    labels = [f"step {step}, prompt {prompt + 1}, seed {seed}" for step, prompt, seed in cells]
    return build_sheet([found.get(cell) for cell in cells], labels, folder / SHEET_NAME, len(columns))


def png_bytes(picture: Image.Image, texts: Mapping[str, str], compression: int = 6) -> bytes:
    """Return a picture as the content of a PNG file that also holds `texts`; `compression` is zlib's 1..9."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text) if not text.isascii() else info.add_text(key, text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, compress_level=compression)
    return buffer.getvalue()


def one_line(text: str) -> str:
    """Return a text without line breaks and repeated spaces."""
    return " ".join(text.split())


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """Shrink a picture to `side`, or enlarge a tiny one by a whole factor so that its label has room."""
    from PIL.Image import Resampling

    factor = READABLE_SIDE // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Resampling.NEAREST)
    picture.thumbnail((side, side))
    return picture


def _write_wrapped(pen: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], width: int) -> None:
    """Write a text in as many lines as it takes, at most eight."""
    font, words = _label_font(), drawable(text).split()
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    for number, line in enumerate(lines[:8]):
        pen.text((corner[0], corner[1] + number * LINE_HEIGHT), _fitting(line, font, width), fill="#b00000", font=font)


@cache
def _label_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)


def drawable(text: str) -> str:
    """Return a text in what Pillow's own font has, ASCII: letters without accents, and the codes of other scripts."""
    plain = unicodedata.normalize("NFKD", one_line(text))
    bare = "".join(character for character in plain if not unicodedata.combining(character))
    return bare.encode("ascii", "backslashreplace").decode("ascii")


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
