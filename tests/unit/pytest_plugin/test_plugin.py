"""The pytest plugin in a stranger's repository: its options and settings, its gates, and what it stores."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from knormpress.cache.fingerprint import model_fingerprint
from knormpress.methods import knorm
from knormpress.methods.knorm import KnormPress
from knormpress.records.history import History
from knormpress.records.plan import Plan, PlannedModel, PlannedTargets, write_plan
from knormpress.workload.models import load_model
from tests.tiny_folder import save_text
from tests.unit.conftest import Run

README = Path(__file__).parents[3] / "README.md"
LENGTHS = "context=40, scored=24"

SHOWN = f"""
def test_press(knorm_press, knorm_method, knorm_device, knorm_bench, knorm_ppl_tolerance, knorm_quality, knorm_latency):
    score = getattr(knorm_method, "score", None)
    print("seen:", knorm_press.keep_ratio, knorm_press.prune_after, knorm_press.skip_layers, knorm_device)
    print("method:", score.__name__ if score else type(knorm_method).__name__)
    print("bench:", knorm_bench.layers, knorm_bench.text_info.name[:6], knorm_ppl_tolerance)
    print("documents:", len(knorm_quality([knorm_press], {LENGTHS})[0].quality.documents))
    print("stopped:", knorm_latency(knorm_press, prompt_tokens=40, new_tokens=3).stopped)
"""

OPTIONS = [
    (
        {
            "keep_ratios": "0.8,0.5",
            "prune_after": "17",
            "skip_layers": "1,2",
            "device": "cpu,cpu:0",
            "method": "random",
            "corpus": "prose",
            "samples": "3",
            "ppl_tolerance": "7.5",
            "precision": "1000000",
        },
        {
            "seen": [f"{ratio} 17 (1, 2) {device}" for device in ("cpu", "cpu:0") for ratio in (0.8, 0.5)],
            "method": ["random_order"] * 4,
            "bench": ["3 Python 7.5"] * 4,
            "documents": ["3"] * 4,
            "stopped": ["precise"] * 4,
        },
    ),
    (
        {"keep_ratios": "1.0", "skip_layers": "none", "device": "auto", "method": "full", "seconds": "0.01"},
        {"seen": ["1.0 16 () cpu"], "method": ["FullCache"], "stopped": ["time"]},
    ),
]


@pytest.mark.parametrize("how", ["options", "ini"])
@pytest.mark.parametrize(("given", "shown"), OPTIONS, ids=["one", "other"])
def test_every_option(
    run: Run, model_folder: Path, how: str, given: dict[str, str], shown: dict[str, list[str]]
) -> None:
    result = run(SHOWN, how=how, **({"precision": "0.0001", "model": model_folder} | given))
    result.assert_outcomes(passed=len(shown["seen"]))
    for name, values in shown.items():
        lines = [line.partition(": ")[2] for line in result.outlines if line.startswith(f"{name}: ")]
        assert sorted(lines) == sorted(values)


def test_a_model_that_is_spread(run: Run) -> None:
    shown = """
def test_it(knorm_memory, knorm_method, knorm_device, knorm_bench):
    knorm_memory(knorm_method, prompt_tokens=40)
    print("on:", knorm_device, "|", knorm_bench.environment.device_map)
"""
    result = run(shown, device=None, device_map="auto,cpu=100KB")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["on: cpu | cpu: model.embed_tokens, model.layers.0; disk: model.layers.1-2, *"])


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("keep_ratios", "0.5,x", "--knorm-keep-ratios is '0.5,x'"),
        ("keep_ratios", "2", "keep_ratio is 2.0"),
        ("device", "cuda:7", "'cuda:7'"),
        ("device", "gpu", "'gpu'"),
        ("device_map", "cpu", "--knorm-device-map is 'cpu'"),
        ("device_map", "auto", "device is cpu and there is a device_map"),
        ("thresholds", "speed=1", "'speed=1'"),
        ("plan", "none.json", "none.json"),
        ("seconds", "nan", "--knorm-seconds is 'nan'"),
        ("seconds", "-1", "seconds is -1.0"),
        ("seconds", "-inf", "seconds is -inf"),
        ("precision", "nan", "--knorm-precision is 'nan'"),
        ("precision", "-0.5", "precision is -0.5"),
        ("samples", "0", "samples is 0"),
        ("ppl_tolerance", "nan", "--knorm-ppl-tolerance is 'nan'"),
        ("passkey_share", "most", "--knorm-passkey-share is 'most'"),
    ],
)
def test_wrong_input_is_one_line(run: Run, name: str, value: str, named: str) -> None:
    result = run("def test_it(): pass\n", "--knorm-compare", **{name: value})
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith("ERROR: ")
    assert named in line


def test_plain_help_is_not_slowed_by_torch() -> None:
    """The plugin is loaded by every pytest that it is installed beside."""
    code = "import sys, pytest; pytest.main(['--help']); print({'torch', 'numpy', 'pydantic', 'rich'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "--knorm-keep-ratios" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "set()"


GATE = f"def test_quality(knorm_gate, knorm_press):\n    knorm_gate(knorm_press, {LENGTHS})\n"

SCORED = """
import pytest
from knormpress.records.schema import Result
from tests.record_factory import make_record

@pytest.mark.parametrize("ppl", [0.5, -30.0, 30.0, 4.9])
def test_quality(knorm_gate, ppl):
    knorm_gate(Result(method="x", conditions={}, quality=make_record(0.5, ppl=ppl, documents=8).quality))
"""


def test_a_gate_passes_fails_or_says_how_many_documents_would_decide(run: Run) -> None:
    result = run(SCORED, ppl_tolerance=5)
    result.assert_outcomes(passed=1, failed=2, xfailed=1)
    out = result.stdout.str()
    assert re.search(r"^perplexity \+30\.0 % \(.*\) on 8 documents, .*5 %$", out, re.MULTILINE)
    assert re.search(r"^XFAIL .*4\.9.*inconclusive: .*\+4\.9 %.* about \d+ more", out, re.MULTILINE)
    run(GATE, ppl_tolerance="100000").assert_outcomes(passed=1)


def test_a_gate_never_passes_on_too_few_documents(run: Run) -> None:
    """Not even where nothing is lost; it says what to do."""
    result = run(SCORED.replace("documents=8", "documents=7"), ppl_tolerance=50)
    result.assert_outcomes(xfailed=4)
    assert re.search(r"inconclusive: .*7 of 8.* --knorm-samples 8", result.stdout.str())
    run(GATE, ppl_tolerance="100000", samples=7, keep_ratios="1.0").assert_outcomes(xfailed=1)


SEVERAL = """
import pytest
from knormpress.records.schema import Result
from tests.record_factory import make_record

UNDECIDED, GOOD, BAD = (5, 10), (40, 40), (1, 40)

@pytest.mark.parametrize("later", [[], [GOOD], [UNDECIDED], [BAD]], ids=["alone", "good", "undecided", "bad"])
def test_gates(knorm_gate, knorm_passkey_gate, later):
    quality = make_record(0.5, ppl=4.9, documents=8).quality
    knorm_gate(Result(method="x", conditions={}, quality=quality))
    for answered in later:
        knorm_passkey_gate(answered)
"""


def test_behind_an_inconclusive_gate_another_one_still_fails_the_test(run: Run) -> None:
    result = run(SEVERAL, ppl_tolerance=5, passkey_share=0.5)
    result.assert_outcomes(failed=1, xfailed=3)
    out = result.stdout.str()
    assert re.search(r"^FAILED .*bad.* found 1 of the 40", out, re.MULTILINE)
    assert re.search(r"^XFAIL .*undecided.*inconclusive: .*4\.9 %.*; found 5 of the 10", out, re.MULTILINE)


DECODED = f"""
import pytest

@pytest.mark.parametrize("how", [{{}}, {{"decoded": True}}])
def test_quality(knorm_quality, knorm_gate, knorm_press, how):
    (result,) = knorm_quality([knorm_press], {LENGTHS}, **how)
    assert (result.quality.decoded is not None) == bool(how)
    knorm_gate(knorm_press, {LENGTHS}, **how)
"""


def test_decoding_is_scored_where_asked_for(run: Run) -> None:
    run(DECODED, "--knorm-save", ppl_tolerance="100000", keep_ratios="0.5").assert_outcomes(passed=2)
    stored = [entry.quality for entry in History.read(Path(".benchmarks")).entries]
    assert [quality.decoded is not None for quality in stored if quality] == [False, True]


PASSKEYS = """
import pytest

@pytest.mark.parametrize("answered", [(40, 40), (30, 40), (38, 40), (0, 0)])
def test_gate(knorm_passkey_gate, answered):
    knorm_passkey_gate(answered)

def test_asks(knorm_passkeys, knorm_press):
    print("asked:", knorm_passkeys([knorm_press], count=2))
"""


def test_the_passkey_gate(run: Run) -> None:
    """What decides is tested with ``stats.gates``."""
    result = run(PASSKEYS)
    result.assert_outcomes(passed=2, failed=1, xfailed=2)
    result.stdout.fnmatch_lines_random(
        ["*30 of the 40*75 % (60..86)*90 %*", "XFAIL*38 of the 40*", "asked: [[](0, 0)[]]"]
    )
    run(PASSKEYS, passkey_share="0.5").assert_outcomes(passed=4, xfailed=1)


PERF = """
def test_speed(knorm_latency, knorm_memory, knorm_press):
    knorm_latency(knorm_press, prompt_tokens=40, new_tokens=3)
    knorm_memory(knorm_press, prompt_tokens=40)
"""


def test_latency_lands_in_the_table_and_the_json(run: Run, pytester: pytest.Pytester) -> None:
    result = run(PERF, "--benchmark-json=out.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*Name (time in*", "test_speed*"])
    (benchmark,) = json.loads(Path("out.json").read_text())["benchmarks"]
    assert benchmark["stats"]["rounds"] == 6
    assert benchmark["extra_info"]["stopped"] == "time"
    entry = benchmark["extra_info"]["knormpress"]
    assert len(entry["latency"]["candidate"]) == 6
    assert entry["memory"]["candidate_cache_bytes"] < entry["memory"]["baseline_cache_bytes"]


def test_quick_is_two_pairs(run: Run) -> None:
    run(PERF, "--knorm-quick", "--benchmark-json=out.json", seconds=60).assert_outcomes(passed=1)
    (benchmark,) = json.loads(Path("out.json").read_text())["benchmarks"]
    assert benchmark["stats"]["rounds"] == 2


def test_what_pytest_benchmark_saved_is_a_baseline_too(run: Run) -> None:
    run(PERF, "--benchmark-autosave", "-q")
    result = run(PERF, "--knorm-compare")
    assert "no-baseline" not in result.stdout.str()
    result.stdout.fnmatch_lines(["* bytes * ok *"])


def test_measuring_twice_in_one_test_is_refused(run: Run) -> None:
    result = run(PERF + "    knorm_memory(knorm_press, prompt_tokens=40)\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*test_speed*memory twice*"])


def test_the_readmes_tests_run_as_shown(run: Run, tmp_path: Path) -> None:
    """A stranger's perf test and quality gate, word for word, and under ten lines each."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (shown,) = (block for block in blocks if "def test_" in block)
    assert all(len(test.splitlines()) < 10 for test in shown.split("\n\n\n"))
    save_text(tmp_path / "text.txt", characters=24_000)
    found = run(shown, "--knorm-save", "--knorm-quick", ppl_tolerance="1e6", samples=2, corpus=tmp_path / "text.txt")
    # Two documents are fewer than the one gate needs, and the tiny model answers nothing for the other.
    found.assert_outcomes(passed=1, xfailed=1)
    timed, scored = History.read(Path(".benchmarks")).entries
    assert timed.latency is not None
    assert scored.quality is not None
    assert scored.retrieval is not None


@pytest.fixture(scope="module")
def plan(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the tiny model."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    fingerprint = model_fingerprint(load_model(str(model_folder), device=torch.device("cpu")).model)
    planned = Plan(
        press=KnormPress(layer_keep_ratios=(1.0, 0.5, 0.25), prune_after=16),
        model=PlannedModel(name="tiny", dtype="float32", fingerprint=fingerprint),
        targets=PlannedTargets(ppl=5.0, passkey=None),
        calibration={},
        held_out={},
    )
    write_plan(planned, path)
    return path


PLANNED = "def test_it(knorm_press, knorm_bench):\n    print('seen:', knorm_press.layer_keep_ratios)\n"


def test_a_plan_takes_the_place_of_the_keep_ratios(run: Run, plan: Path) -> None:
    result = run(PLANNED, plan=plan, keep_ratios="0.9,0.5")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*seen: (1.0, 0.5, 0.25)*", "PASSED*[[]*plan[]]*"])


def test_auto_is_the_plan_that_comes_with_the_package(run: Run, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knorm, "shipped_plan", lambda fingerprint, scores: plan)
    result = run(PLANNED, plan="auto", keep_ratios="0.9,0.5")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*seen: (1.0, 0.5, 0.25)*", "PASSED*[[]*plan[]]*"])


def test_where_none_comes_with_the_package_auto_is_refused(run: Run) -> None:
    result = run(PLANNED, plan="auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no plan comes with KnormPress*knormpress tune*"])


def test_a_plan_for_another_model_is_refused(run: Run, plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(plan.read_text().replace('"fingerprint": "', '"fingerprint": "f'))
    result = run(PLANNED, plan=other)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*other.json*tiny*float32*"])
