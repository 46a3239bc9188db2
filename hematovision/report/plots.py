"""Figures: data in, Axes out. One look for every notebook."""

from __future__ import annotations

import itertools
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
SPLIT_COLOURS = {"random 80/20 (leaky)": WARN, "official, by photograph": ACCENT, "published": MUTED}
SOURCE_COLOURS = {"elsewhere": WARN, "the same laboratory": ACCENT}


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
    lines = 0 if titles is None else max((str(t).count("\n") + 1 for t in titles), default=0)
    extra = 0.14 + 0.14 * lines if lines else 0.06
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


def plot_confusions(confusions: Mapping[str, NDArray[np.int64]], classes: Sequence[str]) -> Figure:
    """Draw several confusion matrices side by side, each under its name; two a row where classes are many."""
    wide = len(classes) > 4
    columns = min(2 if wide else 3, len(confusions))
    rows = -(-len(confusions) // columns)
    edge = 6.2 if wide else 4.3
    figure, axes = plt.subplots(rows, columns, figsize=(edge * columns, 0.95 * edge * rows), squeeze=False)
    for ax, (name, confusion) in zip(axes.flat, confusions.items(), strict=False):
        plot_confusion(confusion, classes, ax=ax, title=name)
    for ax in axes.flat[len(confusions) :]:
        ax.set_visible(False)
    figure.tight_layout()
    return figure


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
    # below: beside it the legend would take half of the width
    ax.legend(
        handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(hues)
    )
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


def plot_reliability(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw accuracy against confidence: on the diagonal a model is as often right as it says.

    Parameters
    ----------
    table : DataFrame
        From `calibration.reliability_table`; the size of a point is the bin's share of the images.
    """
    ax = _axes(ax, (4.6, 4.2))
    confidence, accuracy, low, high = (
        100 * table[k].to_numpy(float) for k in ("confidence", "accuracy", "low", "high")
    )
    ax.plot([0, 100], [0, 100], color=MUTED, lw=1, ls="--", label="perfectly calibrated")
    ax.vlines(confidence, low, high, color=ACCENT, lw=1.5, alpha=0.5, label="95 % interval")
    share = table["images"].to_numpy(float) / table["images"].sum()
    ax.scatter(confidence, accuracy, s=20 + 300 * share, color=ACCENT, edgecolor="white", lw=0.8, zorder=3)
    start = 10 * np.floor(min(confidence.min(), low.min()) / 10)
    ax.set(xlim=(start, 102), ylim=(start, 102), title=title)
    ax.set(xlabel="mean confidence (%)", ylabel="accuracy (%)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.set_aspect("equal")
    ax.legend(loc="upper left", fontsize=9)
    return ax


def plot_risk_coverage(
    frame: pd.DataFrame, ax: Axes | None = None, *, threshold: float | None = None, title: str = ""
) -> Axes:
    """Draw the error among accepted cells against how many are accepted.

    Parameters
    ----------
    frame : DataFrame
        From `calibration.risk_coverage`.
    threshold : float, optional
        The least confidence that was chosen; its point is marked.
    """
    ax = _axes(ax, (5.6, 3.4))
    coverage, risk = 100 * frame["coverage"].to_numpy(float), 100 * frame["risk"].to_numpy(float)
    ax.plot(coverage, risk, color=ACCENT, lw=1.8, drawstyle="steps-post" if len(frame) < 50 else "default")
    accepted = frame["threshold"].to_numpy(float) >= (threshold if threshold is not None else np.inf)
    if accepted.any():
        x, y = coverage[accepted][-1], risk[accepted][-1]
        ax.plot(x, y, "o", color=WARN, ms=7, zorder=3)
        text = f"confidence {threshold:.2f}: {x:.0f} % accepted, {y:.1f} % of them wrong"
        side, shift = ("right", -6) if x > 50 else ("left", 6)
        ax.annotate(text, (x, y), (shift, 10), textcoords="offset points", ha=side, fontsize=9, color=WARN)
    ax.set(xlabel="accepted (% of cells)", ylabel="wrong (% of accepted)", title=title, xlim=(0, 101))
    ax.set_ylim(0, max(1.0, 1.12 * float(risk.max())))
    return ax


def plot_reliabilities(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw reliability diagrams side by side, each under its name."""
    figure, axes = plt.subplots(1, len(tables), figsize=(4.6 * len(tables), 4.4), squeeze=False)
    for ax, (name, table) in zip(axes.flat, tables.items(), strict=True):
        plot_reliability(table, ax=ax, title=name)
    figure.tight_layout()
    return figure


def plot_risk_coverages(curves: Mapping[str, pd.DataFrame], threshold: float) -> Figure:
    """Draw curves of risk against coverage side by side, each under its name, with one threshold marked."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 3.5), squeeze=False)
    for ax, (name, curve) in zip(axes.flat, curves.items(), strict=True):
        plot_risk_coverage(curve, ax=ax, threshold=threshold, title=name)
    figure.tight_layout()
    return figure


def plot_doubts(crops: Sequence[RGB], table: pd.DataFrame, title: str = "") -> Figure | None:
    """Draw cells whose label is at odds with something else; nothing where there is none.

    Parameters
    ----------
    crops : sequence of uint8 arrays of shape (side, side, 3)
    table : DataFrame
        One row a cell. Its first three columns are shown: the label, the other opinion, and a share (0 to 1).
    """
    if not len(table):
        return None
    titles = [f"{label}\n{other} ({share:.0%})" for label, other, share in table.iloc[:, :3].to_numpy()]
    return plot_images(list(crops), titles, columns=8, edge=1.6, title=title)


def plot_cams(
    images: Sequence[RGB], overlays: Sequence[RGB], titles: Sequence[str], title: str = ""
) -> Figure:
    """Draw cells in a row and below each where the model looked, and return the figure.

    Parameters
    ----------
    images, overlays : sequences of uint8 arrays of shape (height, width, 3)
        The cells and `explanation.cam_overlay` of each.
    titles : sequence of str
        One a cell.
    """
    figure, axes = plt.subplots(
        2, len(images), figsize=(1.35 * len(images), 2.9 + (0.35 if title else 0)), squeeze=False
    )
    for i, (upper, lower) in enumerate(axes.T):
        for ax, rgb in ((upper, images[i]), (lower, overlays[i])):
            ax.imshow(rgb)
            ax.set_axis_off()
        upper.set_title(titles[i], fontsize=8, fontweight="normal", loc="center", pad=2)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def plot_learning_curve(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    hue: str = "model",
    ylabel: str = "balanced accuracy (%)",
    palette: Mapping[str, str] | None = None,
) -> Axes:
    """Draw a score against the number of photographs that were learned from, with interval bands.

    Parameters
    ----------
    frame : DataFrame
        Columns ``photographs, value, low, high`` (the last three 0 to 1) and the column named by ``hue``.
    """
    ax = _axes(ax, (6.8, 3.8))
    names = list(dict.fromkeys(frame[hue]))
    colours = palette or dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    # a marker each as well: no palette tells seven lines apart for every eye
    for name, marker in zip(names, itertools.cycle("osD^vPX"), strict=False):
        rows = frame[frame[hue] == name].sort_values("photographs")
        x = rows["photographs"].to_numpy(float)
        value, low, high = (100 * rows[k].to_numpy(float) for k in ("value", "low", "high"))
        ax.fill_between(x, low, high, color=colours[name], alpha=0.15, lw=0)
        ax.plot(x, value, color=colours[name], marker=marker, ms=5, lw=1.8, label=str(name))
    ticks = sorted(frame["photographs"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set(xlabel="photographs learned from", ylabel=ylabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
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


def plot_trials(
    table: pd.DataFrame,
    names: Sequence[str],
    ax: Axes | None = None,
    *,
    score: str = "balanced_loss",
    logarithmic: Sequence[str] = ("learning_rate",),
) -> Axes:
    """Draw trials as parallel coordinates: an upright axis a hyperparameter, the score as the last one.

    Parameters
    ----------
    table : DataFrame
        One row a trial.
    names : sequence of str
        Its columns of hyperparameters, numbers or texts.
    ax : Axes, optional
    score : str
        The column by which trials are coloured; the lowest is the best, and drawn in front.
    logarithmic : sequence of str
        Columns whose axis is logarithmic.
    """
    ax = _axes(ax, (1.5 * (len(names) + 1) + 0.8, 3.8))
    heights = {}
    for i, name in enumerate([*names, score]):
        heights[name], ticks = _place(table[name], name in logarithmic)
        ax.plot([i, i], [0, 1], color="#C9D1D8", lw=1.2, zorder=1)
        for text, height in ticks.items():
            label = ax.annotate(
                text, (i, height), (5, 7), textcoords="offset points", fontsize=8, va="center"
            )
            label.set(zorder=4, bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.6})
    shade = sns.light_palette(ACCENT, reverse=True, as_cmap=True)
    ranks = table[score].rank(method="first").to_numpy(int)
    for row in np.argsort(-ranks):
        best = ranks[row] == 1
        ax.plot(
            range(len(heights)),
            [h[row] for h in heights.values()],
            color=WARN if best else shade(0.75 * (ranks[row] - 1) / max(1, len(table) - 1)),
            lw=2.4 if best else 1.3,
            marker="o",
            ms=4,
            zorder=3 if best else 2,
            label="best trial" if best else None,
        )
    ax.set_xticks(range(len(heights)), [str(n).replace("_", " ") for n in heights], fontsize=9)
    ax.set(yticks=[], xlim=(-0.3, len(heights) - 0.3), ylim=(-0.08, 1.08))
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    return ax


def _place(column: pd.Series, logarithmic: bool) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Return where the values of a column lie on an axis from 0 to 1, and its labels."""
    if not pd.api.types.is_numeric_dtype(column):
        codes, texts = pd.factorize(column, sort=True)
        step = 1 / max(1, len(texts) - 1)
        return codes.astype(np.float64) * step, {str(v): i * step for i, v in enumerate(texts)}
    values = column.to_numpy(float)
    scale = np.log(values) if logarithmic else values
    low, span = scale.min(), np.ptp(scale) or 1.0
    place = (scale - low) / span
    # few values are all named; of many, the ends
    named = np.unique(values) if len(np.unique(values)) <= 6 else np.array([values.min(), values.max()])
    return place, {f"{v:.3g}": float(place[values == v][0]) for v in named}


def plot_importance(frame: pd.DataFrame, ax: Axes | None = None, xlabel: str = "share of importance") -> Axes:
    """Draw how much each hyperparameter decided, as bars with their spread, the greatest above.

    Parameters
    ----------
    frame : DataFrame
        Columns ``name, importance, spread`` (0 to 1), in the order to be drawn.
    """
    ax = _axes(ax, (6.4, 0.42 * len(frame) + 0.9))
    names = [str(n).replace("_", " ") for n in frame["name"]]
    ax.barh(names, frame["importance"], xerr=frame["spread"], color=ACCENT, ecolor=MUTED, height=0.6)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    ax.set_xlim(left=0)
    ax.grid(False, axis="y")
    return ax
