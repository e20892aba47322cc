"""The plan file: read as it was written, and refused where it is not whole or for another model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from knormpress.errors import KnormError
from knormpress.fingerprints import model_fingerprint
from knormpress.plan import KeptTokens, Plan, Point, Sensitivities, read_plan, write_plan
from knormpress.press import KnormPress
from tests.strategies import tiny_model

PRESS = KnormPress(layer_keep_ratios=(1.0, 0.25, 0.5), keep_recent=32)
PLAN = Plan(
    press=PRESS,
    model={"name": "tiny", "dtype": "float32", "fingerprint": "0123"},
    targets={"ppl": 5.0, "passkey": None},
    calibration={"text": "a", "documents": 6},
    held_out={"text": "a", "documents": 8, "scored": 256, "context": 1024},
    frontier=(Point("tuned", PRESS, 0.5833, (1.0, -0.5, 2.5), 0.01, (39, 40)),),
    sensitivities=Sensitivities((0.1, 0.4), ((0.1, 0.0),) * 3, ((0.0, 0.0),) * 3),
    kept=KeptTokens(("the", " <sea>\n"), ((1.0, 1.0), (0.0, 0.5), (1.0, 0.0))),
)


def test_read_as_written(tmp_path):
    path = tmp_path / "folder" / "plan.json"
    write_plan(PLAN, path)
    assert read_plan(path) == PLAN
    assert PLAN.mean_keep == pytest.approx(0.58333, abs=1e-4)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_an_unfinished_plan_can_be_read(tmp_path):
    plan = replace(PLAN, frontier=(), sensitivities=None, kept=None)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_the_press_of_a_plan_for_its_model_only(tmp_path):
    model, other = tiny_model("llama"), tiny_model("qwen3")
    path = tmp_path / "plan.json"
    write_plan(replace(PLAN, model=PLAN.model | {"fingerprint": model_fingerprint(model)}), path)
    assert KnormPress.from_plan(path, model) == PRESS
    with pytest.raises(KnormError, match=r"plan\.json is a plan for tiny in float32 .* not for this model"):
        KnormPress.from_plan(path, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not whole JSON"),
        ("[]", "has format None"),
        ('{"format": "other"}', "has format 'other'"),
        ('{"format": "knormpress-plan-1"}', "is no whole plan"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(KnormError, match=message):
        read_plan(path)


@pytest.mark.parametrize("part", ["press", "model", "frontier", "targets"])
def test_a_plan_with_a_part_missing_is_refused(tmp_path, part):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    values = json.loads(path.read_text())
    del values[part]
    path.write_text(json.dumps(values))
    with pytest.raises(KnormError, match="is no whole plan"):
        read_plan(path)


def test_a_ratio_out_of_range_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    path.write_text(path.read_text().replace("0.25", "1.25", 1))
    with pytest.raises(KnormError, match="layer_keep_ratios"):
        read_plan(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(KnormError, match="knormpress tune"):
        read_plan(tmp_path / "none.json")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_plan(replace(PLAN, targets={"ppl": float("nan")}), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("targets",), {"ppl": 5.0}),
        (("targets", "ppl"), "5"),
        (("targets", "passkey"), 10**400),
        (("held_out",), []),
        (("held_out", "documents"), None),
        (("frontier", 0, "name"), 5),
        (("frontier", 0, "ppl"), [1.0, 2.0]),
        (("frontier", 0, "kl"), 10**400),
        (("frontier", 0, "passkeys"), [1]),
        (("sensitivities", "text", 0), [0.1]),
        (("kept", "tokens", 0), 5),
        (("kept", "layers", 0), [1.0]),
        (("kept", "layers"), []),
        (("sensitivities",), {"ratios": [], "text": [[]], "passkey": [[]]}),
    ],
)
def test_a_plan_of_wrong_types_is_refused(tmp_path, place, value):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    values = json.loads(path.read_text())
    inner = values
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(KnormError, match="is no whole plan") as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)


def test_numbers_and_nesting_beyond_all_bounds_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    path.write_text(path.read_text().replace("0.25", "1" + "0" * 400, 1))
    with pytest.raises(KnormError, match="layer_keep_ratios"):
        read_plan(path)
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(KnormError, match="is not whole JSON"):
        read_plan(path)
