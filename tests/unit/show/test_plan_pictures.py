"""The pictures of a plan: what they draw, and names and tokens of any kind that stand apart."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from knormpress import KnormPress
from knormpress.errors import KnormError
from knormpress.records.plan import KeptTokens, Plan, Sensitivities, read_plan, write_plan
from knormpress.show.pictures.draw import draw_plan
from knormpress.show.pictures.frontier import draw_frontier
from knormpress.show.pictures.kept import draw_kept
from knormpress.show.pictures.sensitivities import draw_sensitivities
from knormpress.show.pictures.style import GREEN, STYLE
from tests.pictures import Drawn, faults, size
from tests.plan_factory import LAYERS, POINTS, TOKENS, TUNED, make_plan, make_point

NAMES = ["knormpress_frontier.png", "knormpress_sensitivities.png", "knormpress_kept.png"]
HOSTILE = ("_x", "$y$", "${", "\N{CJK UNIFIED IDEOGRAPH-7EF4}" * 9, "long " * 50, "a\nb", "\\frac{1}{", "")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with matplotlib_style.context(["default", STYLE]):
        yield


def frontier(plan: Plan) -> Figure:
    return draw_frontier(plan, plan.frontier)


def places(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def stars(axes: Axes) -> list[tuple[float, float]]:
    return [(x, y) for line in axes.get_lines() if line.get_marker() == "*" for x, y in np.asarray(line.get_xydata())]


def targets(axes: Axes) -> list[float]:
    lines = [line for line in axes.get_lines() if line.get_color() == GREEN]
    for line in lines:
        assert line.get_ydata()[0] == line.get_ydata()[1]
    return [float(line.get_ydata()[0]) for line in lines]


def mesh(axes: Axes) -> QuadMesh:
    (drawn,) = [part for part in axes.collections if isinstance(part, QuadMesh)]
    return drawn


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def legend(figure: Figure) -> list[str]:
    (entries,) = figure.legends
    return [text.get_text() for text in entries.get_texts()]


def test_three_pictures_of_the_stated_size_whose_texts_are_apart(tmp_path: Path, drawn: Drawn) -> None:
    paths = draw_plan(make_plan(), tmp_path / "new")
    assert [path.name for path in paths] == NAMES
    assert [size(path) for path in paths] == [(1600, 1000)] * 3
    assert len(drawn) == 3
    assert sum(map(len, drawn.values())) > 90
    assert faults(drawn) == []
    for texts in drawn.values():
        line = " ".join(text for text, _ in texts)
        for part in ("SmolLM2-135M-Instruct, float32", "mean keep 0.400", "second half, 12 documents", "2026-11-24"):
            assert part in line


def test_hostile_names_and_tokens_are_drawn_as_they_are_and_apart(tmp_path: Path, drawn: Drawn) -> None:
    tokens = (*HOSTILE, " ", "\x00\x1b", "\u202egnp", "\ud800", "\ufdfd", "W" * 400, "\t", "\r\n") * 6
    plan = make_plan(
        model={"name": "/models/" + "a_$x^2$_/" * 40, "dtype": "float32", "fingerprint": "0"},
        calibration={"text": "t" * 300, "documents": [1, 2, 3], "passkeys": None, "more": {"a": None}},
        frontier=tuple(make_point(name, 0.1 * place + 0.1, 3.0) for place, name in enumerate(HOSTILE)),
        kept=KeptTokens(tokens=tokens, layers=((0.5,) * len(tokens),) * LAYERS),
    )
    draw_plan(plan, tmp_path)
    assert faults(drawn) == []
    shown = [[text for text, _ in texts] for texts in drawn.values()]
    assert {" _x", "$y$", "${", "?" * 9, "a?b"} <= set(shown[0])
    assert shown[2].count("$y$") == 6
    assert shown[2].count("\N{OPEN BOX}") == 6
    assert shown[2].count("??") == 6
    assert shown[2].count("\N{RETURN SYMBOL}\N{RETURN SYMBOL}") == 6


@pytest.mark.parametrize("layers", [1, 12, 30, 80])
def test_texts_stay_apart_for_any_number_of_layers(layers: int, drawn: Drawn) -> None:
    ratios = tuple(0.1 * step for step in range(1, 10))
    losses = tuple(tuple(0.01 * (layer + 1) * ratio for ratio in ratios) for layer in range(layers))
    plan = make_plan(press=KnormPress(layer_keep_ratios=(0.5,) * layers))
    draw_sensitivities(plan, Sensitivities(ratios=ratios, text=losses, answers=losses)).savefig(io.BytesIO())
    assert len(drawn) == 1
    assert faults(drawn) == []


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (12, 7), (30, 60), (30, 100), (80, 101)])
def test_texts_stay_apart_for_any_number_of_tokens(layers: int, tokens: int, drawn: Drawn) -> None:
    kept = KeptTokens(tokens=("tremendous",) * tokens, layers=((1.0,) * tokens,) * layers)
    draw_kept(make_plan(), kept).savefig(io.BytesIO())
    assert len(drawn) == 1
    assert faults(drawn) == []


def test_the_frontier_draws_the_figures_of_the_plan() -> None:
    upper, lower = frontier(make_plan()).axes
    assert places(upper, "uniform") == [(0.5, 16.7), (0.7, 6.4), (0.9, 1.25)]
    assert places(upper, "tuned") == [(0.25, 8.0), (0.4, 2.9), (0.65, 0.4)]
    assert places(upper, "random") == [(0.5, 140.0)]
    assert places(lower, "uniform") == [(0.5, 75.0), (0.7, 95.0), (0.9, 100.0)]
    assert places(lower, "tuned") == [(0.4, 90.0), (0.65, 100.0)]
    whiskers = {
        (float(end[0][0]), round(float(end[0][1]), 6), round(float(end[1][1]), 6))
        for part in upper.collections
        if isinstance(part, LineCollection)
        for end in part.get_segments()
    }
    assert whiskers == {(point.mean_keep, round(point.ppl[1], 6), round(point.ppl[2], 6)) for point in POINTS}
    assert upper.get_xlim() == lower.get_xlim()


def test_names_have_looks_of_their_own_that_do_not_depend_on_the_plan() -> None:
    def look(line: Line2D) -> tuple[Any, ...]:
        return line.get_color(), line.get_marker(), line.get_linestyle()

    points = [
        make_point(name, 0.5, 1.0) for name in ("mine", "keydiff", "uniform", "tuned", "other", "random", "third")
    ]
    upper = frontier(make_plan(frontier=tuple(points))).axes[0]
    looks = {line.get_label(): look(line) for line in upper.get_lines() if line.get_marker() in "o<>DXvph"}
    assert len(set(looks.values())) == len(looks) == 7
    alone = frontier(make_plan(frontier=(points[2],))).axes[0]
    (line,) = (line for line in alone.get_lines() if line.get_marker() in "o<>DXvph")
    assert look(line) == looks["uniform"]


def test_the_star_is_at_the_plan_as_read_from_its_file(tmp_path: Path) -> None:
    write_plan(make_plan(), tmp_path / "plan.json")
    figure = frontier(read_plan(tmp_path / "plan.json"))
    assert [stars(axes) for axes in figure.axes] == [[(0.4, 2.9)], [(0.4, 90.0)]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["this plan"]
    assert any("keeps 0.400\nPPL +2.9 %" in entry and "found 36 of 40" in entry for entry in legend(figure))


def test_a_plan_that_was_not_measured_has_no_star() -> None:
    figure = frontier(make_plan(press=replace(TUNED, keep_recent=0)))
    assert [stars(axes) for axes in figure.axes] == [[], []]
    assert not any("this plan" in entry for entry in legend(figure))


def test_the_name_of_the_star_is_clear_of_lines_and_whiskers() -> None:
    crowd = tuple(make_point("uniform", 0.3 + 0.02 * step, 2.9 - 0.1 * step) for step in range(8))
    figure = frontier(make_plan(frontier=(*POINTS, *crowd)))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    box = axes.texts[0].get_window_extent()
    frame = axes.get_window_extent()
    assert frame.x0 < box.x0 < box.x1 < frame.x1
    assert frame.y0 < box.y0 < box.y1 < frame.y1
    for line in axes.get_lines():
        if len(line.get_xdata()) > 2:
            assert not line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False)


@pytest.mark.parametrize(("ppl", "share"), [(5.0, 0.9), (0.5, 0.0), (60.0, 1.0)])
def test_targets_are_drawn_where_they_are(ppl: float, share: float) -> None:
    figure = frontier(make_plan(targets={"ppl": ppl, "retrieval": share}))
    assert [targets(axes) for axes in figure.axes] == [[ppl], [100 * share]]
    for axes in figure.axes:
        assert axes.get_ylim()[0] < targets(axes)[0] < axes.get_ylim()[1]
    assert any(f"+{ppl:g} %" in entry and f"{100 * share:g} %" in entry for entry in legend(figure))


def test_a_target_that_was_not_asked_for_is_not_drawn() -> None:
    figure = frontier(make_plan(targets={"ppl": 5.0, "retrieval": None}))
    assert [targets(axes) for axes in figure.axes] == [[5.0], []]
    (target,) = (entry for entry in legend(figure) if "target" in entry)
    assert "passkeys" not in target


@pytest.mark.parametrize("ruined", [140.0, 2.5e6])
def test_a_ruined_policy_does_not_squash_the_others(ruined: float) -> None:
    axes = frontier(make_plan(frontier=(*POINTS, make_point("highest-norm", 0.4, ruined)))).axes[0]
    (_, zero), (_, five), (_, top) = axes.transData.transform([(0.5, 0.0), (0.5, 5.0), (0.5, ruined)])
    assert five - zero > 40
    assert top < axes.get_window_extent().y1


@pytest.mark.parametrize("found", [None, (0, 0)])
def test_without_items_there_is_one_panel(found: tuple[int, int] | None) -> None:
    points = tuple(point.model_copy(update={"found": found}) for point in POINTS)
    (axes,) = frontier(make_plan(frontier=points)).axes
    assert axes.get_position().height > 0.7
    assert axes.get_xlabel() != ""


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        ({"frontier": ()}, NAMES[1:]),
        ({"sensitivities": None}, [NAMES[0], NAMES[2]]),
        ({"kept": None}, NAMES[:2]),
        ({"kept": KeptTokens(tokens=(), layers=((),)), "frontier": ()}, [NAMES[1]]),
    ],
)
def test_what_a_plan_lacks_has_no_picture(
    missing: dict[str, Any], left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: path.touch())
    assert [path.name for path in draw_plan(make_plan(**missing), tmp_path)] == left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


def test_a_plan_with_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KnormError, match="no measurements to draw"):
        draw_plan(make_plan(frontier=(), sensitivities=None, kept=None), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_sensitivities_are_coloured_by_size_and_the_plan_stands_beside() -> None:
    text = ((0.02, 0.001), (0.0002, -0.5), (0.0, 0.0002), (0.004, 1e-12), (0.1, -0.1), (0.3, 0.2))
    sensitivities = Sensitivities(
        ratios=(0.1, 0.5), text=text, answers=tuple((1.0 + layer, -0.0) for layer in range(LAYERS))
    )
    figure = draw_sensitivities(make_plan(), sensitivities)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    figure.draw_without_rendering()
    drawn = mesh(panels["Text"])
    lightness = drawn.get_facecolors()[:, :3].sum(axis=1)
    values = np.array(text).ravel()
    order = np.argsort(values)
    assert (np.diff(lightness[order]) <= 0).all()
    assert lightness[values > 0.0005].max() < lightness[values <= 0].min()
    assert np.ptp(lightness[values <= 0]) == 0
    assert np.argmin(lightness) == 10
    written = [part.get_text() for part in panels["Text"].texts]
    assert written[:4] == ["0.020", "0.001", "0.000", "\N{MINUS SIGN}0.500"]
    assert [part.get_text() for part in panels["Items"].texts][:2] == ["1.00", "0.00"]
    assert [bar.get_width() for bar in panels["The plan"].patches] == list(TUNED.layer_keep_ratios or ())
    assert [bar.get_y() + bar.get_height() / 2 for bar in panels["The plan"].patches] == pytest.approx(range(LAYERS))
    assert panels["The plan"].get_ylim() == panels["Text"].get_ylim()
    assert panels["Text"].get_ylim()[0] > panels["Text"].get_ylim()[1]
    assert [label.get_text() for label in panels["Text"].get_xticklabels()] == ["0.1", "0.5"]


def test_sensitivities_that_cost_nothing_at_all_are_all_pale(tmp_path: Path) -> None:
    sensitivities = Sensitivities(ratios=(0.5,), text=((0.0,),) * LAYERS, answers=())
    figure = draw_sensitivities(make_plan(), sensitivities)
    assert "Passkeys" not in [axes.get_title(loc="left") for axes in figure.axes]
    figure.savefig(tmp_path / "pale.png")
    assert len(np.unique(mesh(figure.axes[0]).get_facecolors(), axis=0)) == 1


def test_a_policy_for_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KnormError, match=r"2 entries.*6 layers"):
        draw_plan(make_plan(press=KnormPress(layer_keep_ratios=(0.5, 0.9))), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_kept_tokens_are_drawn_by_layer_and_token() -> None:
    kept = make_plan().kept
    assert kept is not None
    figure = draw_kept(make_plan(), kept)
    axes = figure.axes[0]
    shown = np.asarray(mesh(axes).get_array())
    assert shown.shape == (LAYERS, len(TOKENS))
    np.testing.assert_allclose(shown, 100 * np.array(kept.layers))
    assert [label.get_text() for label in axes.get_xticklabels()][7:10] == [".", "\N{RETURN SYMBOL}" * 2, "It"]
    assert axes.get_ylim() == (LAYERS - 0.5, -0.5)


def test_a_long_stretch_is_cut_and_says_so() -> None:
    kept = KeptTokens(tokens=tuple(map(str, range(2000))), layers=(tuple(place / 2000 for place in range(2000)),) * 2)
    figure = draw_kept(make_plan(), kept)
    shown = np.asarray(mesh(figure.axes[0]).get_array())
    assert shown.shape == (2, 100)
    assert shown[0, 99] == pytest.approx(99 / 20)
    assert "The first 100 of 2,000 tokens." in words(figure)
