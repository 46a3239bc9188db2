"""Figures: data in, Axes out. One look for every notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hematovision.classes import COLOURS
from hematovision.files import atomic_path
from hematovision.vision.field import RGB, Box

INK, MUTED, ACCENT, WARN = "#22303C", "#8A97A3", "#2A6F97", "#C1440E"


def use_house_style() -> None:
    """Set the look of all figures: white ground, quiet grid, sizes that read on a projector."""
    sns.set_theme(
        style="whitegrid",
        rc={
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.edgecolor": "#C9D1D8",
            "axes.labelcolor": INK,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": "#E7EBEE",
            "font.size": 11,
            "legend.frameon": False,
        },
    )


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 3.8)) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=size)[1]


def plot_counts(counts: pd.DataFrame, ax: Axes | None = None, xlabel: str = "images") -> Axes:
    """Draw horizontal bars: rows are classes, columns are sides; the number stands at each bar."""
    ax = _axes(ax)
    tall = counts.rename_axis("class").reset_index().melt("class", var_name="side", value_name="n")
    sns.barplot(tall, x="n", y="class", hue="side", palette="crest", ax=ax)
    for bars in ax.containers:
        ax.bar_label(bars, padding=3, fontsize=9, color=INK)  # type: ignore[arg-type]
    ax.set(xlabel=xlabel, ylabel="")
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    if counts.shape[1] > 1:
        ax.legend(title="", loc="upper left", bbox_to_anchor=(1, 1))
    elif ax.get_legend() is not None:
        ax.get_legend().remove()  # type: ignore[union-attr]
    return ax


def plot_images(
    images: Sequence[RGB],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    edge: float = 1.35,
    colours: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw pictures in a grid, each with a short title, and return the figure."""
    columns = min(columns, max(1, len(images)))
    rows = -(-len(images) // columns)
    ratio = images[0].shape[0] / images[0].shape[1]
    extra = 0.28 if titles is not None else 0.06
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * edge, rows * (edge * ratio + extra) + (0.35 if title else 0)),
        squeeze=False,
    )
    for i, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if i < len(images):
            ax.imshow(images[i])
            if titles is not None:
                colour = colours[i] if colours is not None else INK
                ax.set_title(titles[i], fontsize=8, fontweight="normal", loc="center", color=colour, pad=2)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def plot_field(
    rgb: RGB, found: Sequence[Box] = (), truth: Sequence[Box] = (), ax: Axes | None = None
) -> Axes:
    """Draw a field with found boxes (solid) and annotated boxes (dashed)."""
    ax = _axes(ax, (4.8, 3.6))
    ax.imshow(rgb)
    ax.set_axis_off()
    for boxes, style, colour in ((truth, "--", "#0B3C5D"), (found, "-", "#F2B705")):
        for b in boxes:
            ax.add_patch(Rectangle((b.x, b.y), b.width, b.height, fill=False, lw=1.8, ls=style, ec=colour))
    return ax


def draw_boxes(rgb: RGB, found: Sequence[Box] = (), truth: Sequence[Box] = ()) -> RGB:
    """Return a copy of a field with found boxes (yellow) and annotated ones (dark blue) drawn in."""
    import cv2

    out = rgb.copy()
    for boxes, colour, inset in ((truth, (11, 60, 93), 0), (found, (242, 183, 5), 4)):
        for b in boxes:
            corner = (b.x + b.width - 1 - inset, b.y + b.height - 1 - inset)
            cv2.rectangle(out, (b.x + inset, b.y + inset), corner, colour, 3)
    return out


def plot_history(
    history: pd.DataFrame, axes: Sequence[Axes] | None = None, title: str = ""
) -> Sequence[Axes]:
    """Draw loss and accuracy by epoch, training and validation, the best epoch marked."""
    if axes is None:
        axes = list(plt.subplots(1, 2, figsize=(9, 3.2))[1])
    for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
        ax.plot(history["epoch"], history[name], color=MUTED, marker="o", ms=3, label="training")
        ax.plot(history["epoch"], history[f"val_{name}"], color=ACCENT, marker="o", ms=3, label="validation")
        if len(history):
            best = history["epoch"].to_numpy()[history["val_loss"].to_numpy().argmin()]
            ax.axvline(float(best), color=WARN, lw=1, ls=":", label="best epoch")
        ax.set(xlabel="epoch", ylabel=name, title=title if name == "loss" else "")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_ylim(0, 1.02)
    axes[1].legend(loc="lower right", fontsize=9)
    return axes


def plot_confusion(
    confusion: NDArray[np.int64], classes: Sequence[str], ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw a confusion matrix: colour is the share of the true class, the number counts images."""
    ax = _axes(ax, (4.4, 3.8))
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    sns.heatmap(
        share,
        annot=confusion,
        fmt="d",
        cmap=sns.light_palette(ACCENT, as_cmap=True),
        vmin=0,
        vmax=1,
        cbar=False,
        square=True,
        linewidths=1,
        xticklabels=list(classes),
        yticklabels=list(classes),
        annot_kws={"fontsize": 10},
        ax=ax,
    )
    ax.set(xlabel="predicted", ylabel="true", title=title)
    ax.tick_params(axis="x", rotation=30, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    return ax


def plot_intervals(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    hue: str,
    xlabel: str = "accuracy (%)",
    palette: Mapping[str, str] | None = None,
) -> Axes:
    """Draw values with their intervals as a forest plot.

    Parameters
    ----------
    table : DataFrame
        Columns ``name, value, low, high`` (0 to 1) and the column named by ``hue``.
    """
    ax = _axes(ax, (7.4, 0.55 * len(table["name"].unique()) * table[hue].nunique() ** 0.6 + 1.2))
    names, hues = list(dict.fromkeys(table["name"])), list(dict.fromkeys(table[hue]))
    colours = palette or dict(zip(hues, (ACCENT, WARN, "#5B8E7D", MUTED), strict=False))
    step = 0.7 / max(1, len(hues))
    for _, row in table.iterrows():
        y = names.index(row["name"]) + (hues.index(row[hue]) - (len(hues) - 1) / 2) * step
        value, low, high = (100 * float(row[k]) for k in ("value", "low", "high"))
        colour = colours[row[hue]]
        if np.isfinite(low):
            ax.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="round")
        ax.plot(value, y, "o" if np.isfinite(low) else "D", color=colour, ms=6, label=str(row[hue]))
        ax.annotate(f"{value:.1f}", (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel=xlabel)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    ax.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_shares(shares: Mapping[str, float], ax: Axes | None = None, xlabel: str = "% of images") -> Axes:
    """Draw a few percentages as labelled bars."""
    ax = _axes(ax, (6.4, 0.55 * len(shares) + 0.9))
    values = [100 * v for v in shares.values()]
    bars = ax.barh(list(shares), values, color=[ACCENT, WARN, MUTED, "#5B8E7D"][: len(shares)], height=0.6)
    ax.bar_label(bars, [f"{v:.1f} %" for v in values], padding=4)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, xlim=(0, 112))
    ax.grid(False, axis="y")
    return ax


def plot_distribution(
    values: pd.Series, threshold: float | None = None, ax: Axes | None = None, xlabel: str = ""
) -> Axes:
    """Draw how values are distributed, on a logarithmic count, with a threshold as a line."""
    ax = _axes(ax, (6.4, 2.8))
    sns.histplot(values, bins=50, color=ACCENT, edgecolor="white", ax=ax)
    ax.set(xlabel=xlabel, ylabel="images", yscale="log")
    if threshold is not None:
        ax.axvline(threshold, color=WARN, lw=1.2, ls="--")
    return ax


def class_colours(labels: Sequence[str]) -> list[str]:
    """Return the colour of each label."""
    return [COLOURS[label] for label in labels]


def save_figure(figure: Figure, folder: Path, name: str, caption: str, alt: str) -> dict[str, Any]:
    """Write ``<name>.png`` into a folder, atomically, and return its entry for ``metrics.json``."""
    with atomic_path(folder / f"{name}.png") as temporary:
        # a fixed metadata block: equal figures, equal bytes
        figure.savefig(temporary, dpi=130, bbox_inches="tight", metadata={"Software": None})
    return {"file": f"{name}.png", "caption": caption, "alt": alt}
