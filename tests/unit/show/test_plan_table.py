"""A plan as it is printed."""

from __future__ import annotations

import io

from rich.console import Console

from knormpress import KnormPress
from knormpress.records.plan import Plan, Point
from knormpress.show.plan_table import print_plan
from tests.plan_factory import make_plan


def printed(plan: Plan) -> str:
    file = io.StringIO()
    print_plan(plan, Console(file=file, width=200))
    return file.getvalue()


def test_every_point_stands_with_its_figures() -> None:
    plan = make_plan()
    lines = [" ".join(line.split()) for line in printed(plan).splitlines()]
    for point in plan.frontier:
        name = "tuned (the plan)" if plan.is_own(point) else point.name
        answered = "" if point.found is None else f" {point.found[0]}/{point.found[1]}"
        figures = f"{point.mean_keep:.3f} {point.change} {point.change.interval} {point.kl:.4f}{answered}"
        assert f"{name} {figures}" in lines
    assert "keep ratio of each layer: 0.9 0.1 0.2 0.4 0.3 0.5" in lines
    assert "keep_recent: 64" in lines
    assert sum("(the plan)" in line for line in lines) == 1


def test_a_large_plan_fits_80_columns() -> None:
    press = KnormPress(layer_keep_ratios=(0.123,) * 80)
    interval = (-1234.5, -2345.6, 12345.6)
    points = [
        Point(name=name, press=policy, mean_keep=0.123, ppl=interval, kl=1.2345, found=(140, 140))
        for name, policy in (("tuned", press), ("uniform", press), ("tuned for perplexity", KnormPress(0.5)))
    ]
    name = "an-organisation-of-that-name/a-model-with-a-very-long-name-7B-Instruct"
    text = printed(
        make_plan(
            press=press,
            model={"name": name, "dtype": "float32", "fingerprint": "0"},
            held_out={"documents": 8, "scored": 256, "context": 131_072},
            frontier=tuple(points),
        )
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("0.123") >= 80


def test_on_a_narrow_terminal_rows_are_stacked() -> None:
    file = io.StringIO()
    plan = make_plan()
    print_plan(plan, Console(file=file, width=40, force_terminal=True, color_system=None))
    assert "\N{HORIZONTAL ELLIPSIS}" not in file.getvalue()
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines.count("plan or method tuned (the plan)") == 1
    assert f"PPL change {plan.frontier[0].change}" in lines
