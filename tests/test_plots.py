"""Figures show the data that went in, on the Axes they were given, and are saved to equal bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hematovision.classes import COLOURS
from hematovision.errors import HematoVisionError
from hematovision.report import plots
from hematovision.vision.field import Box

plt = plots.plt


@pytest.fixture(autouse=True)
def house_style() -> Iterator[None]:
    before = mpl.rcParams.copy()
    plt.switch_backend("agg")
    plots.use_house_style()
    yield
    plt.close("all")
    mpl.rcParams.update(before)


def picture(value: int = 200, height: int = 20, width: int = 30) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, np.uint8)


HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3, 4],
        "loss": [1.0, 0.7, 0.5, 0.4],
        "accuracy": [0.4, 0.6, 0.8, 0.9],
        "val_loss": [1.1, 0.6, 0.8, 0.9],
        "val_accuracy": [0.3, 0.7, 0.6, 0.6],
    }
)
INTERVALS = pd.DataFrame(
    {
        "name": ["VGG16", "VGG16", "ResNet50"],
        "split": ["official", "published", "official"],
        "value": [0.8, 0.9, 0.6],
        "low": [0.7, np.nan, 0.5],
        "high": [0.85, np.nan, 0.72],
    }
)


class TestAxes:
    @pytest.mark.parametrize(
        "draw",
        [
            lambda ax: plots.plot_counts(pd.DataFrame({"train": [3, 5]}, index=["a", "b"]), ax),
            lambda ax: plots.plot_field(picture(), ax=ax),
            lambda ax: plots.plot_confusion(np.eye(2, dtype=np.int64), ["a", "b"], ax),
            lambda ax: plots.plot_intervals(INTERVALS, ax, hue="split"),
            lambda ax: plots.plot_shares({"a": 0.5}, ax),
            lambda ax: plots.plot_distribution(pd.Series([1.0, 2.0]), ax=ax),
        ],
        ids=["counts", "field", "confusion", "intervals", "shares", "distribution"],
    )
    def test_given_ones_are_used_and_returned(self, draw: object) -> None:
        figure, axes = plt.subplots(1, 2)
        assert draw(axes[1]) is axes[1]  # type: ignore[operator]
        assert axes[1].has_data()
        assert not axes[0].has_data()
        assert plt.get_fignums() == [figure.number]
        assert isinstance(draw(None), Axes)  # type: ignore[operator]
        assert len(plt.get_fignums()) == 2


class TestCounts:
    def test_one_bar_a_class_and_side_with_its_number(self) -> None:
        counts = pd.DataFrame({"train": [30, 12], "test": [7, 3]}, index=["monocyte", "neutrophil"])
        ax = plots.plot_counts(counts, xlabel="photographs")
        assert sorted(bar.get_width() for bar in ax.patches if bar.get_width()) == [3, 7, 12, 30]
        assert {t.get_text() for t in ax.texts} == {"30", "12", "7", "3"}
        assert [t.get_text() for t in ax.get_yticklabels()] == ["monocyte", "neutrophil"]
        assert {t.get_text() for t in ax.get_legend().get_texts()} == {"train", "test"}
        assert ax.get_xlabel() == "photographs"

    def test_one_side_needs_no_legend(self) -> None:
        assert plots.plot_counts(pd.DataFrame({"train": [3]}, index=["a"])).get_legend() is None


class TestImages:
    def test_a_grid_with_titles(self) -> None:
        shown = [picture(10 * i) for i in range(5)]
        figure = plots.plot_images(shown, list("abcde"), columns=3, colours=["#ff0000"] * 5, title="All")
        assert isinstance(figure, Figure)
        assert len(figure.axes) == 6
        for ax, rgb, title in zip(figure.axes, shown, "abcde", strict=False):
            assert np.array_equal(ax.images[0].get_array(), rgb)
            assert ax.get_title(loc="center") == title
            assert to_hex(ax.title.get_color()) == "#ff0000"
        assert not figure.axes[5].images
        assert not any(ax.axison for ax in figure.axes)
        assert figure.get_suptitle() == "All"

    def test_fewer_pictures_than_columns(self) -> None:
        assert len(plots.plot_images([picture()], columns=8).axes) == 1


class TestField:
    def test_found_boxes_are_solid_and_annotated_ones_dashed(self) -> None:
        ax = plots.plot_field(picture(), [Box(1, 2, 10, 8)], [Box(3, 4, 5, 6), Box(0, 0, 2, 2)])
        solid = [p for p in ax.patches if p.get_linestyle() == "-"]
        dashed = [p for p in ax.patches if p.get_linestyle() == "--"]
        assert [p.get_bbox().bounds for p in solid] == [(1, 2, 10, 8)]
        assert [p.get_bbox().bounds for p in dashed] == [(3, 4, 5, 6), (0, 0, 2, 2)]
        assert np.array_equal(ax.images[0].get_array(), picture())

    def test_boxes_drawn_into_a_copy(self) -> None:
        rgb = picture(200, 60, 80)
        out = plots.draw_boxes(rgb, [Box(10, 10, 40, 30)], [Box(20, 5, 30, 40)])
        assert (rgb == 200).all()
        assert out.shape == rgb.shape
        colours = {tuple(c) for c in out.reshape(-1, 3).tolist()}
        assert colours == {(200, 200, 200), (242, 183, 5), (11, 60, 93)}
        assert (out[:3] == 200).all()  # nothing beyond the outer edge of a line of three pixels

    def test_no_boxes_leave_the_picture_alone(self) -> None:
        assert np.array_equal(plots.draw_boxes(picture()), picture())


class TestHistory:
    def test_both_sides_and_the_best_epoch(self) -> None:
        loss, accuracy = plots.plot_history(HISTORY, title="VGG16")
        for ax, name in ((loss, "loss"), (accuracy, "accuracy")):
            lines = {line.get_label(): line for line in ax.lines}
            assert list(lines) == ["training", "validation", "best epoch"]
            assert lines["training"].get_ydata().tolist() == HISTORY[name].tolist()
            assert lines["validation"].get_ydata().tolist() == HISTORY[f"val_{name}"].tolist()
            assert list(lines["best epoch"].get_xdata()) == [2, 2]
            assert ax.get_ylabel() == name
            assert all(float(tick).is_integer() for tick in ax.get_xticks())
        assert loss.get_title(loc="left") == "VGG16"
        assert accuracy.get_ylim() == (0, 1.02)
        assert len(accuracy.get_legend().get_texts()) == 3

    def test_no_epoch_is_an_empty_figure(self) -> None:
        assert len(plots.plot_history(HISTORY.iloc[:0])) == 2

    def test_given_axes(self) -> None:
        axes = list(plt.subplots(1, 2)[1])
        assert plots.plot_history(HISTORY, axes) is axes


class TestConfusion:
    def test_numbers_count_and_colour_is_the_share_of_the_row(self) -> None:
        confusion = np.array([[3, 1, 0], [20, 60, 20], [0, 0, 0]])
        ax = plots.plot_confusion(confusion, ["mo", "ne", "ly"], title="VGG16")
        assert [t.get_text() for t in ax.texts] == [str(n) for n in confusion.ravel()]
        shares = np.asarray(ax.collections[0].get_array()).reshape(3, 3)
        assert shares == pytest.approx(np.array([[0.75, 0.25, 0], [0.2, 0.6, 0.2], [0, 0, 0]]))
        assert ax.collections[0].get_clim() == (0, 1)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
        assert [t.get_text() for t in ax.get_xticklabels()] == ["mo", "ne", "ly"]
        assert ax.get_title(loc="left") == "VGG16"


class TestIntervals:
    def test_a_line_each_interval_and_a_diamond_without_one(self) -> None:
        palette = {"official": "#112233", "published": "#445566"}
        ax = plots.plot_intervals(INTERVALS, hue="split", palette=palette)
        spans = [line.get_xdata().tolist() for line in ax.lines if len(line.get_xdata()) == 2]
        assert spans == [pytest.approx([70, 85]), pytest.approx([50, 72])]
        points = {
            (round(float(line.get_xdata()[0])), line.get_marker(), to_hex(line.get_color()))
            for line in ax.lines
            if len(line.get_xdata()) == 1
        }
        assert points == {(80, "o", "#112233"), (90, "D", "#445566"), (60, "o", "#112233")}
        assert [t.get_text() for t in ax.texts] == ["80.0", "90.0", "60.0"]
        assert [t.get_text() for t in ax.get_yticklabels()] == ["VGG16", "ResNet50"]
        assert {t.get_text() for t in ax.get_legend().get_texts()} == {"official", "published"}

    def test_the_first_name_is_on_top_and_hues_do_not_overlap(self) -> None:
        ax = plots.plot_intervals(INTERVALS, hue="split")
        assert ax.yaxis_inverted()
        heights = [float(line.get_ydata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
        assert heights[0] < heights[1] < 0.5 < heights[2]


class TestShares:
    def test_bars_in_percent_in_order_from_the_top(self) -> None:
        ax = plots.plot_shares({"random": 0.934, "official": 0.0})
        assert [bar.get_width() for bar in ax.patches] == pytest.approx([93.4, 0])
        assert {t.get_text() for t in ax.texts} == {"93.4 %", "0.0 %"}
        assert [t.get_text() for t in ax.get_yticklabels()] == ["random", "official"]
        assert ax.yaxis_inverted()


class TestDistribution:
    def test_counts_all_values_and_marks_the_threshold(self) -> None:
        values = pd.Series(np.linspace(0, 1, 200))
        ax = plots.plot_distribution(values, threshold=0.4, xlabel="confidence")
        assert sum(bar.get_height() for bar in ax.patches) == 200
        assert [list(line.get_xdata()) for line in ax.lines] == [[0.4, 0.4]]
        assert ax.get_yscale() == "log"
        assert ax.get_xlabel() == "confidence"

    def test_no_threshold(self) -> None:
        assert not plots.plot_distribution(pd.Series([1.0, 2.0, 2.0])).lines


class TestReliability:
    TABLE = pd.DataFrame(
        {
            "confidence": [0.55, 0.8, 0.99],
            "accuracy": [0.5, 0.85, 1.0],
            "low": [0.31, 0.7, 0.9],
            "high": [0.7, 0.93, 1.0],
            "images": [10, 10, 20],
        }
    )

    def test_points_against_the_diagonal_with_their_intervals(self) -> None:
        ax = plots.plot_reliability(self.TABLE, title="Before")
        intervals, points = ax.collections
        assert np.asarray(points.get_offsets()) == pytest.approx(np.array([[55, 50], [80, 85], [99, 100]]))
        assert points.get_sizes() == pytest.approx([95, 95, 170])
        spans = [segment[:, 1].tolist() for segment in intervals.get_segments()]
        assert spans == [pytest.approx(s) for s in ([31, 70], [70, 93], [90, 100])]
        assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 0], [100, 100]]]
        assert ax.get_xlim() == ax.get_ylim() == (30, 102)
        assert ax.get_title(loc="left") == "Before"

    def test_given_ones_are_used(self) -> None:
        ax = plt.subplots()[1]
        assert plots.plot_reliability(self.TABLE, ax) is ax


class TestRiskCoverage:
    FRAME = pd.DataFrame(
        {"threshold": [0.9, 0.8, 0.6], "coverage": [0.25, 0.75, 1.0], "risk": [0.0, 0.1, 0.2]}
    )

    def test_the_curve_and_the_chosen_point(self) -> None:
        ax = plt.subplots()[1]
        assert plots.plot_risk_coverage(self.FRAME, ax, threshold=0.7) is ax
        curve, point = ax.lines
        assert curve.get_xydata().tolist() == pytest.approx(np.array([[25, 0], [75, 10], [100, 20]]))
        assert point.get_xydata().tolist() == [[75, 10]]
        assert [t.get_text() for t in ax.texts] == ["confidence 0.70: 75 % accepted, 10.0 % of them wrong"]
        assert ax.get_ylim()[0] == 0

    def test_no_threshold_or_one_that_accepts_nothing(self) -> None:
        for threshold in (None, 0.95):
            ax = plots.plot_risk_coverage(self.FRAME, threshold=threshold)
            assert len(ax.lines) == 1
            assert not ax.texts


class TestCams:
    def test_each_cell_stands_above_its_map(self) -> None:
        cells, maps = [picture(10 * i) for i in range(3)], [picture(200 + i) for i in range(3)]
        figure = plots.plot_cams(cells, maps, list("abc"), title="Where")
        shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
        assert all(np.array_equal(a, b) for a, b in zip(shown, [*cells, *maps], strict=True))
        assert [ax.get_title(loc="center") for ax in figure.axes] == ["a", "b", "c", "", "", ""]
        assert not any(ax.axison for ax in figure.axes)
        assert figure.get_suptitle() == "Where"


class TestLearningCurve:
    FRAME = pd.DataFrame(
        {
            "photographs": [25, 5, 5, 25],
            "value": [0.8, 0.6, 0.3, 0.5],
            "low": [0.7, 0.4, 0.2, 0.4],
            "high": [0.9, 0.7, 0.4, 0.6],
            "model": ["blood", "blood", "nothing", "nothing"],
        }
    )

    def test_a_line_and_a_band_each_model_over_doublings(self) -> None:
        ax = plt.subplots()[1]
        palette = {"blood": "#112233", "nothing": "#445566"}
        assert plots.plot_learning_curve(self.FRAME, ax, palette=palette) is ax
        lines = {line.get_label(): line for line in ax.lines}
        assert lines["blood"].get_xydata() == pytest.approx(np.array([[5, 60], [25, 80]]))
        assert lines["nothing"].get_xydata() == pytest.approx(np.array([[5, 30], [25, 50]]))
        assert [to_hex(line.get_color()) for line in ax.lines] == ["#112233", "#445566"]
        assert lines["blood"].get_marker() != lines["nothing"].get_marker()
        band = ax.collections[0].get_paths()[0].vertices
        assert {tuple(v) for v in band.round(6).tolist()} >= {(5, 40), (5, 70), (25, 70), (25, 90)}
        assert ax.get_xscale() == "log"
        assert [t.get_text() for t in ax.get_xticklabels()] == ["5", "25"]

    def test_another_column_may_tell_the_lines_apart(self) -> None:
        ax = plots.plot_learning_curve(self.FRAME.rename(columns={"model": "weights"}), hue="weights")
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["blood", "nothing"]


def test_class_colours() -> None:
    assert plots.class_colours(["monocyte", "neutrophil"]) == [COLOURS["monocyte"], COLOURS["neutrophil"]]


class TestSave:
    def test_equal_figures_give_equal_bytes(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            ax = plots.plot_history(HISTORY)[0]
            entry = plots.save_figure(ax.figure, tmp_path, name, "Curves", "Two curves")
            assert entry == {"file": f"{name}.png", "caption": "Curves", "alt": "Two curves"}
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
        assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
        assert b"matplotlib" not in (tmp_path / "one.png").read_bytes().lower()

    def test_saving_again_gives_the_same(self, tmp_path: Path) -> None:
        figure = plots.plot_images([picture(40), picture(90)], ["a", "b"])
        for name in ("one", "two"):
            plots.save_figure(figure, tmp_path, name, "", "")
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()

    def test_other_data_give_other_bytes(self, tmp_path: Path) -> None:
        for name, value in (("one", 0.2), ("two", 0.3)):
            plots.save_figure(plots.plot_shares({"a": value}).figure, tmp_path, name, "", "")
        assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()

    def test_a_place_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(HematoVisionError, match="a file stands where a folder should be"):
            plots.save_figure(plots.plot_shares({"a": 0.1}).figure, tmp_path / "file", "one", "", "")
