"""The web demo: drop a picture of a stained smear, and see every white cell named.

    python app_gradio.py [--model DIR] [--port N] [--share]

For research and teaching, not for clinical use.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
import tempfile
from abc import ABCMeta
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageFont

from hematovision.classes import COLOURS
from hematovision.data.synthetic import draw_field
from hematovision.errors import HematoVisionError, ImageError
from hematovision.release.bundle import PURPOSE
from hematovision.release.predict import CellPrediction, Cells, Classifier
from hematovision.vision.crop import MARGIN, crop_cell
from hematovision.vision.field import RGB, Box
from hematovision.vision.image import encode_jpeg, read_image

SHOWN_SIDE = 1600  # pixels; larger pictures are scaled for the screen, never for the model
CROP_SIDE = 160
KEPT_SECONDS = 3600  # uploads are looked at every hour, and removed when an hour old
UPLOAD_LIMIT = "64mb"
PATIENCE = 5  # times that a page is asked whether it is up
MARKS = {"accept": "✓ accept", "review": "? review", "reject": "✕ reject"}  # never by colour alone
HEADERS = ["cell", "class", "confidence", "decision", "reason"]
WAYS: list[tuple[str, Cells]] = [("a field: find the white cells", "find"), ("one cell, cut out", "whole")]

# what is on the drawn fields that the page offers, as far as the model knows the classes
EXAMPLES = (
    (11, ("neutrophil", "lymphocyte"), 0),
    (4, ("eosinophil", "monocyte"), 1),
    (7, ("lymphocyte", "neutrophil", "neutrophil"), 2),
    (9, ("basophil", "erythroblast"), 0),
)

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "monospace"),
)

CSS = """
.gradio-container { max-width: min(1280px, 100%) !important; margin: 0 auto; }
#head h1 { margin-bottom: 0; }
#cells { min-width: 0 !important; }
#cells .table-wrap { overflow-x: auto; }
#cells, #cells span, #cells td { font-family: var(--font) !important; }
.card { display: flex; gap: 1rem; align-items: flex-start; flex-wrap: wrap; }
.card img { width: 160px; height: 160px; border-radius: 8px; border: 4px solid var(--cell); }
.card .bars { flex: 1 1 220px; }
.card h3 { margin: 0 0 .5rem; }
.bar { display: grid; grid-template-columns: 7.5em 1fr 4em; gap: .5em; align-items: center; margin: .3em 0; }
.bar .track { background: var(--border-color-primary); border-radius: 4px; height: 1em; }
.bar .fill { display: block; height: 100%; border-radius: 4px; min-width: 2px; }
.bar .value { text-align: right; font-variant-numeric: tabular-nums; }
"""

State = list[tuple[tuple[float, float, float, float], str]]  # box on the screen's picture, card


def _uploaded(_component: gr.Image, payload: Any) -> str | None:
    """Return the path of an upload, which gradio has checked to be one."""
    return None if payload is None else payload.path


# An image as it was uploaded, byte for byte: decoding is the library's work, and it answers in words.
# A `class` statement would do, but gradio's metaclass then writes an interface file beside this one; as a
# template, and of its parent's module, the component is shown as its parent is.
SmearImage: Any = ABCMeta.__new__(
    type(gr.Image),
    "SmearImage",
    (gr.Image,),
    {"preprocess": _uploaded, "is_template": True, "__module__": gr.Image.__module__},
)


# -- what is shown -------------------------------------------------------------------------------


def draw_outlines(rgb: RGB, cells: Sequence[CellPrediction]) -> tuple[Image.Image, float]:
    """Outline every cell in the colour of its class, with its number and name.

    Returns
    -------
    picture : PIL image
        With its longer side at most `SHOWN_SIDE`.
    scale : float
        Pixels of the picture per pixel of ``rgb``.
    """
    picture = Image.fromarray(rgb)
    scale = min(1.0, SHOWN_SIDE / max(picture.size))
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    pen, line = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 200))
    font = ImageFont.load_default(max(12, round(max(picture.size) / 36)))
    for cell in cells:
        if cell.cell == 0:
            continue
        x0, y0, x1, y1 = _corners(cell, scale)
        colour = COLOURS[cell.label]
        # a white rim keeps the outline apart from stain of its own colour
        pen.rounded_rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), 3 * line, outline="white", width=line + 2)
        pen.rounded_rectangle((x0, y0, x1, y1), 3 * line, outline=colour, width=line)
        text = f" {cell.cell} {cell.label}{' ?' if cell.decision == 'review' else ''} "
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        wide, high = right - left, bottom - top + 2 * line
        x = min(max(0, x0), max(0, picture.width - wide))
        y = y0 - high if y0 >= high else y0  # inside, where there is no room above
        pen.rectangle((x, y, x + wide, y + high), fill=colour)
        pen.text((x, y + line - top), text, font=font, fill=_readable_on(colour))
    return picture, scale


def _corners(cell: CellPrediction, scale: float) -> tuple[float, float, float, float]:
    x, y, width, height = (float(v or 0) * scale for v in (cell.x, cell.y, cell.width, cell.height))
    return x, y, x + width, y + height


def _readable_on(colour: str) -> str:
    """Return black or white, whichever has the higher contrast (WCAG 2 relative luminance)."""
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def make_card(rgb: RGB, cell: CellPrediction, margin: float = MARGIN) -> str:
    """Return a cell's picture, cut with a margin, its probabilities as bars and the decision as HTML."""
    box = Box(cell.x or 0, cell.y or 0, cell.width or 1, cell.height or 1)
    picture = base64.b64encode(encode_jpeg(crop_cell(rgb, box, CROP_SIDE, margin), 85)).decode()
    bars = "".join(
        f'<div class="bar"><span>{name}</span><span class="track"><span class="fill" '
        f'style="width:{100 * p:.1f}%;background:{COLOURS[name]}"></span></span>'
        f'<span class="value">{100 * p:.1f} %</span></div>'
        for name, p in sorted(cell.probabilities.items(), key=lambda item: -item[1])
    )
    said = MARKS[cell.decision] + (f": {html.escape(cell.reason)}" if cell.reason else "")
    return (
        f'<div class="card" style="--cell:{COLOURS[cell.label]}">'
        f'<img src="data:image/jpeg;base64,{picture}" alt="cell {cell.cell}">'
        f'<div class="bars"><h3>Cell {cell.cell}: {cell.label}</h3>{bars}<p>{said}</p></div></div>'
    )


def make_table(cells: Sequence[CellPrediction]) -> list[list[Any]]:
    """Return the rows that the page shows, one a cell."""
    return [
        [c.cell, c.label, f"{100 * (c.confidence or 0):.1f} %", MARKS[c.decision], c.reason]
        for c in cells
        if c.cell
    ]


def summarise(cells: Sequence[CellPrediction]) -> str:
    """Say in a line what was found."""
    found = [c for c in cells if c.cell]
    if not found:
        return f"**✕ rejected:** {cells[0].reason}."
    left = sum(c.decision == "review" for c in found)
    plural = "" if len(found) == 1 else "s"
    return f"**{len(found)} cell{plural}**, {len(found) - left} accepted, {left} for review."


def describe(classifier: Classifier) -> str:
    """Say which model answers."""
    bundle = classifier.bundle
    drawn = bundle.provenance.get("dataset") == "synthetic"
    caution = "**Trained on drawn cells alone: what it says of real blood means nothing.** " if drawn else ""
    facts = {
        "network": bundle.backbone,
        "initial weights": bundle.weights,
        "profile": bundle.provenance.get("profile", "unknown"),
        "trained on": bundle.provenance.get("dataset", "unknown"),
        "knows": ", ".join(bundle.classes),
        "model": f"`{bundle.sha256[:16]}`",
    }
    return caution + " · ".join(f"{key}: {value}" for key, value in facts.items())


# -- the page ------------------------------------------------------------------------------------


def draw_examples(classes: Sequence[str], folder: Path) -> list[str]:
    """Draw fields with cells of the given classes; return their paths."""
    paths = []
    for seed, labels, laboratory in EXAMPLES:
        if set(labels) <= set(classes):
            path = folder / f"drawn-{'-'.join(dict.fromkeys(labels))}.jpg"
            path.write_bytes(encode_jpeg(draw_field(seed, labels, laboratory).rgb))
            paths.append(str(path))
    return paths


def build_app(classifier: Classifier) -> gr.Blocks:
    """Return the page: one picture in; outlines, table and bars out; ``/predict`` for programs."""
    # removed when the process ends; gradio serves copies of it
    drawn = tempfile.TemporaryDirectory(prefix="hematovision-")
    examples = draw_examples(classifier.classes, Path(drawn.name))

    def show(path: str | None, cells: Cells) -> tuple[Any, str, list[list[Any]], State, str]:
        if path is None:
            return None, "Drop a picture of a stained smear on the left.", [], [], ""
        try:
            rgb = read_image(path, name="The picture")
            found = classifier.predict(rgb, cells)
        except ImageError as error:
            return None, f"**✕ rejected:** {error}.", [], [], ""
        picture, scale = draw_outlines(rgb, found)
        margin = classifier.bundle.crop_margin if cells == "find" else 0.0
        state = [(_corners(c, scale), make_card(rgb, c, margin)) for c in found if c.cell]
        return picture, summarise(found), make_table(found), state, state[0][1] if state else ""

    def predict(path: str | None, cells: Cells) -> list[dict[str, Any]]:
        """Name the white cells of a picture.

        Takes an image file, and "find" (a field, in which white cells are found) or "whole" (one cell,
        cut out). Returns one record a cell: image, cell, x, y, width, height, label, confidence,
        decision (accept, review or reject), reason, and p_<class> for every class.
        """
        if path is None:
            raise gr.Error("send an image", print_exception=False)
        try:
            found = classifier.predict(path, cells, name="image")
        except ImageError as error:
            found = [CellPrediction.rejected("image", str(error), unreadable=True)]
        return [cell.to_row(classifier.classes) for cell in found]

    def choose_row(state: State, event: gr.SelectData) -> str:
        return state[event.index[0]][1] if event.index[0] < len(state) else ""

    def choose_cell(state: State, event: gr.SelectData) -> Any:
        x, y = event.index
        inside = [
            (right - left, card)
            for (left, top, right, bottom), card in state
            if left <= x <= right and top <= y <= bottom
        ]
        return min(inside)[1] if inside else gr.skip()  # of cells that touch, the smaller

    with gr.Blocks(
        title="HematoVision", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as app:
        gr.Markdown("# HematoVision\nWhite blood cells in a stained smear, found and named.", elem_id="head")
        gr.Markdown(f"**{PURPOSE.capitalize()}.**", elem_id="note")
        state = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = SmearImage(
                    examples[0] if examples else None,
                    label="Picture of a smear",
                    sources=["upload", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    height=300,
                )
                ways = gr.Radio(WAYS, value="find", label="The picture shows")
                gr.Examples([[path] for path in examples], image, label="Drawn examples (no real blood)")
            with gr.Column(scale=3, min_width=320):
                outlined = gr.Image(
                    label="White cells found (click one)",
                    format="jpeg",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    alt_text="The picture with every white cell outlined, numbered and named",
                )
                summary = gr.Markdown()
        with gr.Row():
            table = gr.Dataframe(
                headers=HEADERS,
                datatype=["number", "str", "str", "str", "str"],
                label="Cells (choose a row)",
                interactive=False,
                wrap=True,
                column_widths=["56px", "120px", "110px", "100px", "240px"],
                elem_id="cells",
                scale=4,
                min_width=320,
            )
            with gr.Column(scale=3, min_width=320):
                card = gr.HTML(container=True, padding=True)
        gr.Markdown(describe(classifier), elem_id="model")

        inputs, outputs = [image, ways], [outlined, summary, table, state, card]
        for event in (app.load, image.change, ways.change):
            event(show, inputs, outputs, api_visibility="private", show_progress="minimal")
        table.select(choose_row, state, card, api_visibility="private", show_progress="hidden")
        outlined.select(choose_cell, state, card, api_visibility="private", show_progress="hidden")
        records = gr.JSON(visible=False)
        gr.Button(visible=False).click(predict, inputs, records, api_name="predict")
    app.drawn_examples = drawn  # lives as long as the page
    return app


def launch(share: bool = False, port: int = 7860, model: Path | str | None = None) -> None:
    """Load the model and serve the page until stopped.

    Raises
    ------
    HematoVisionError
        If there is no model, the port is taken, or the page does not come up.
    """
    classifier = Classifier.load(model)
    print(f"model: {classifier.bundle.title}; {PURPOSE}", file=sys.stderr, flush=True)
    app = build_app(classifier)
    for attempt in range(PATIENCE):
        try:
            app.launch(
                share=share,
                server_port=port,
                theme=THEME,
                css=CSS,
                max_file_size=UPLOAD_LIMIT,
                footer_links=["api", "settings"],
                run_history=False,
                ssr_mode=False,
                quiet=attempt > 0,
            )
            return
        except OSError as error:
            raise HematoVisionError(f"port {port} cannot be used", "name another with --port N") from error
        except ValueError as error:
            # gradio asks its own page for a sign of life and gives up after three seconds, while the
            # server goes on: asked again, a busy machine answers
            if attempt + 1 == PATIENCE:
                raise HematoVisionError(
                    f"the page does not answer on port {port}",
                    "the machine is too busy, or a proxy stands before it (set NO_PROXY=127.0.0.1)",
                ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the demo from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=f"The web demo of the final model, {PURPOSE}.")
    parser.add_argument("--model", metavar="DIR", type=Path, help="folder of a trained model")
    parser.add_argument(
        "--port", metavar="N", type=int, default=7860, help="port of the page (default: 7860)"
    )
    parser.add_argument("--share", action="store_true", help="open a public link to it (through gradio)")
    options = parser.parse_args(arguments)
    try:
        launch(options.share, options.port, options.model)
    except HematoVisionError as error:
        print(f"hematovision: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
