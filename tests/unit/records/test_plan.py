"""The plan file: read as it was written, and refused if it is not complete or for another model."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from knormpress import KnormPress
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.errors import KnormError
from knormpress.policy.policy import Policy
from knormpress.records.plan import Plan, PlannedModel, PlannedTargets, Point, read_plan, write_plan
from knormpress.records.retrieval import Retrieval
from tests.plan_factory import make_plan
from tests.record_factory import make_record
from tests.strategies import tiny_model

# A file as knormpress 0.1.0 writes it, with one entry of each list.
WRITTEN: dict[str, Any] = {
    "format": "knormpress-plan-1",
    "press": {
        "keep_ratio": 0.9,
        "prune_after": 512,
        "skip_layers": [0],
        "layer_keep_ratios": [1.0, 0.25, 0.5],
        "keep_recent": 32,
        "prune_interval": 64,
        "schedule": "proportional",
    },
    "model": {"name": "tiny", "dtype": "float32", "fingerprint": "0123"},
    "targets": {"ppl": 60.0, "passkey": None},
    "calibration": {"text": "a", "numbers": [1, 3]},
    "held_out": {"text": "a", "documents": 8, "scored": 256, "context": 1024},
    "frontier": [
        {
            "name": "tuned",
            "press": {
                "keep_ratio": 0.9,
                "prune_after": 512,
                "skip_layers": [0],
                "layer_keep_ratios": None,
                "keep_recent": 0,
                "prune_interval": 64,
                "schedule": "proportional",
            },
            "mean_keep": 0.9,
            "ppl": [1.0, -0.5, 2.5],
            "kl": 0.01,
            "passkeys": [39, 40],
        }
    ],
    "sensitivities": {"ratios": [0.1], "text": [[0.1], [0.2], [0.0]], "passkey": [[0.0], [0.5], [0.0]]},
    "kept": {"tokens": ["the", " <sea>\n"], "layers": [[1.0, 1.0], [0.0, 0.5], [1.0, 0.0]]},
    "made": {"tuned": "2026-11-25T02:12:27+00:00", "knormpress": "0.1.0"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def write(path: Path, values: dict[str, Any]) -> str:
    text = json.dumps(values, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def test_a_file_of_an_earlier_version_is_read(path: Path) -> None:
    """Its words were other ones, and it has no scores."""
    write(path, WRITTEN)
    plan = read_plan(path)
    assert plan.press == Policy(layer_keep_ratios=(1.0, 0.25, 0.5), keep_recent=32)
    assert plan.model == PlannedModel(name="tiny", dtype="float32", fingerprint="0123")
    assert plan.targets == PlannedTargets(ppl=60.0, retrieval=None)
    uniform = Policy(keep_ratio=0.9)
    measured = {"mean_keep": 0.9, "ppl": (1.0, -0.5, 2.5), "kl": 0.01, "found": (39, 40)}
    assert plan.frontier == (Point(name="tuned", press=uniform, **measured),)
    assert plan.sensitivities is not None
    assert plan.sensitivities.answers == ((0.0,), (0.5,), (0.0,))
    write_plan(plan, path)
    assert read_plan(path) == plan


@pytest.mark.parametrize(
    "plan",
    [make_plan(), make_plan(frontier=(), sensitivities=None, kept=None, held_out={})],
    ids=["complete", "unfinished"],
)
def test_read_as_written(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "folder" / "plan.json"
    write_plan(plan, path)
    assert read_plan(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_the_figures_of_a_point() -> None:
    tuned, without_items = make_plan().frontier[5:7]
    assert tuned.share == 0.9
    assert without_items.share != without_items.share  # NaN
    assert (tuned.change.percent, tuned.change.ends) == (2.9, tuned.ppl[1:])
    assert make_plan().mean_keep == pytest.approx(0.4)
    # Another method under the same policy is not the plan.
    assert [make_plan().is_own(point) for point in make_plan().frontier] == [False] * 5 + [True, False, False]


def test_where_the_full_cache_finds_nothing_a_point_has_no_share() -> None:
    nothing = Retrieval(asked={"passkey": 1}, items=())
    point = Point.of("tuned", KnormPress(0.5), make_record().quality, layers=4, retrieval=nothing)
    assert point.found is None
    assert point.ends is None


def test_the_press_of_a_plan_is_for_its_model_only(path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3")
    fingerprint = model_fingerprint(model)
    write(path, WRITTEN | {"model": WRITTEN["model"] | {"fingerprint": fingerprint}})
    press = KnormPress.from_plan(path, model)
    assert isinstance(press, KnormPress)
    assert press == read_plan(path).press
    with pytest.raises(KnormError, match=rf"plan\.json .*tiny .*float32 .*{fingerprint}.*{model_fingerprint(other)}"):
        KnormPress.from_plan(path, other)
    read_plan(path).expect(fingerprint, "--plan")
    with pytest.raises(KnormError, match=rf"--plan .*{fingerprint}"):
        read_plan(path).expect("another", "--plan")


def refusal(path: Path) -> str:
    """The message with which ``path`` is refused, which must be one line."""
    with pytest.raises(KnormError) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "knormpress tune" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "No such file"),
        ("{", "JSON"),
        ("[" * 100_000 + "]" * 100_000, "JSON"),
        ("[]", "None"),
        ('{"format": "other"}', "'other'"),
        ('{"format": "knormpress-plan-1"}', "press"),
    ],
    ids=["no file", "cut short", "nested too deep", "no format", "another format", "empty"],
)
def test_what_is_no_plan_is_refused(path: Path, text: str | None, named: str) -> None:
    if text is not None:
        path.write_text(text)
    assert named in refusal(path)


@pytest.mark.parametrize("part", ["press", "model", "targets", "calibration", "held_out"])
def test_a_plan_without_a_part_is_refused(path: Path, part: str) -> None:
    write(path, {name: value for name, value in WRITTEN.items() if name != part})
    assert part in refusal(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("targets",), {"ppl": 5.0}),
        (("targets", "ppl"), "5"),
        (("targets", "passkey"), True),
        (("targets", "passkey"), 10**400),
        (("targets", "passkeys"), 1.0),
        (("held_out",), []),
        (("held_out", "documents"), None),
        (("frontier", 0, "name"), 5),
        (("frontier", 0, "ppl"), [1.0, 2.0]),
        (("frontier", 0, "kl"), 10**400),
        (("frontier", 0, "kl"), float("nan")),
        (("frontier", 0, "passkeys"), [1]),
        (("sensitivities", "text", 0), [0.1, 0.2]),
        (("sensitivities",), {"ratios": [], "text": [[]], "passkey": [[]]}),
        (("kept", "tokens", 0), 5),
        (("kept", "layers", 0), [1.0]),
        (("kept", "layers"), []),
        (("press", "unknown"), 1),
        (("press",), [0.5]),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else repr(value)[:20],
)
def test_a_plan_of_wrong_values_is_refused(path: Path, place: tuple[Any, ...], value: Any) -> None:
    values = json.loads(json.dumps(WRITTEN))
    reduce(lambda inner, step: inner[step], place[:-1], values)[place[-1]] = value
    write(path, values)
    assert str(place[0]) in refusal(path)


@pytest.mark.parametrize(("ratio", "named"), [(1.25, "layer_keep_ratios is 1.25"), (10**400, "layer_keep_ratios")])
def test_a_ratio_out_of_range_is_refused(path: Path, ratio: float, named: str) -> None:
    write(path, WRITTEN | {"press": WRITTEN["press"] | {"layer_keep_ratios": [1.0, ratio, 0.5]}})
    assert named in refusal(path)


def test_a_plan_that_cannot_be_written_leaves_the_old_one(path: Path) -> None:
    text = write(path, WRITTEN)
    not_json = read_plan(path).model_copy(update={"targets": PlannedTargets.model_construct(ppl=float("nan"))})
    with pytest.raises(ValueError, match="JSON"):
        write_plan(not_json, path)
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
    (path.parent / "file").touch()
    with pytest.raises(KnormError, match=r"file.*--output"):
        write_plan(make_plan(), path.parent / "file" / "plan.json")
