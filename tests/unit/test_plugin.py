"""The pytest plugin in a stranger's repository: every option, by itself and as an ini setting, and the comparison."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knormpress import bench
from knormpress.history import History
from knormpress.methods import FullCache
from knormpress.metrics import MemoryUse, measure_memory
from tests.unit.conftest import Run

LENGTHS = "context=40, scored=24"


def prints(expression: str, *fixtures: str) -> str:
    return f"def test_it({', '.join(fixtures)}):\n    print('seen:', {expression})\n"


OPTIONS = [
    ("keep_ratios", "0.8,0.5", prints("knorm_press.keep_ratio", "knorm_press"), ["0.8", "0.5"]),
    ("prune_after", "17", prints("knorm_press.prune_after", "knorm_press"), ["17"]),
    ("skip_layers", "1,2", prints("knorm_press.skip_layers", "knorm_press"), ["(1, 2)"]),
    ("skip_layers", "none", prints("knorm_press.skip_layers", "knorm_press"), ["()"]),
    ("method", "random", prints("knorm_method.score.__name__", "knorm_method"), ["random_order"]),
    ("method", "full", prints("type(knorm_method).__name__", "knorm_method"), ["FullCache"]),
    ("device", "auto", prints("knorm_device", "knorm_device"), ["cpu"]),
    ("device", "cpu,cpu:0", prints("knorm_device", "knorm_device"), ["cpu", "cpu:0"]),
    ("model", "FOLDER", prints("knorm_bench.layers", "knorm_bench"), ["3"]),
    ("corpus", "prose", prints("knorm_bench.text_info.name[:6]", "knorm_bench"), ["Python"]),
    (
        "samples",
        "3",
        prints(f"len(knorm_quality([knorm_press], {LENGTHS})[0].quality.documents)", "knorm_quality", "knorm_press"),
        ["3"],
    ),
    ("ppl_tolerance", "7.5", prints("knorm_ppl_tolerance", "knorm_ppl_tolerance"), ["7.5"]),
    (
        "precision",
        "1000000",
        prints("knorm_latency(knorm_press, prompt_tokens=40, new_tokens=3).stopped", "knorm_latency", "knorm_press"),
        ["precise"],
    ),
    (
        "seconds",
        "0.01",
        prints("knorm_latency(knorm_press, prompt_tokens=40, new_tokens=3).stopped", "knorm_latency", "knorm_press"),
        ["time"],
    ),
]


@pytest.mark.parametrize("how", ["options", "ini"])
@pytest.mark.parametrize(("name", "value", "source", "seen"), OPTIONS, ids=[f"{o[0]}={o[1]}" for o in OPTIONS])
def test_every_option(
    run: Run, model_folder: Path, how: str, name: str, value: str, source: str, seen: list[str]
) -> None:
    extra: dict[str, object] = {"precision": "0.0001"} if name == "seconds" else {}
    if name == "method" and value == "full":
        extra["keep_ratios"] = "1.0"
    given = str(model_folder) if value == "FOLDER" else value
    result = run(source, how=how, **{name: given}, **extra)
    result.assert_outcomes(passed=len(seen))
    found = [line.removeprefix("seen: ") for line in result.outlines if line.startswith("seen: ")]
    assert found == seen


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keep_ratios", "0.5,x", "--knorm-keep-ratios is 'x'; wanted a number"),
        ("keep_ratios", "2", "keep_ratio is 2.0; wanted a number above 0 and at most 1, such as 0.9"),
        ("device", "cuda:7", "device 'cuda:7' can't be used: "),
        ("device", "gpu", "device 'gpu' can't be used: 'gpu' is no device name"),
        ("thresholds", "speed=1", "threshold 'speed=1' is none; wanted NAME=PERCENT"),
    ],
)
def test_bad_input_is_one_line(run: Run, name: str, value: str, message: str) -> None:
    result = run(prints("1"), "--knorm-compare", **{name: value})
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith(f"ERROR: {message}")


def test_plain_help_is_not_slowed_by_torch() -> None:
    """The plugin is loaded by every pytest that it is installed beside."""
    code = "import sys, pytest; pytest.main(['--help']); print({'torch', 'numpy', 'pydantic', 'rich'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "--knorm-keep-ratios" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "set()"


GATE = f"def test_quality(knorm_gate, knorm_press):\n    knorm_gate(knorm_press, {LENGTHS})\n"


SCORED = """
from knormpress import KnormPress
from knormpress.testing import Scored
from tests.record_factory import make_record

def test_quality(knorm_gate):
    knorm_gate(Scored(KnormPress(0.5), make_record(0.5, ppl={ppl}, documents=8).quality, 40, 24))
"""


def test_a_gate_passes_fails_or_says_how_many_documents_would_decide(run: Run) -> None:
    run(SCORED.format(ppl=0.5), ppl_tolerance=5).assert_outcomes(passed=1)
    run(SCORED.format(ppl=-30.0), ppl_tolerance=5).assert_outcomes(failed=1)
    failed = run(SCORED.format(ppl=30.0), ppl_tolerance=5)
    failed.assert_outcomes(failed=1)
    failed.stdout.re_match_lines([r"perplexity \+30\.0 % \(.*\) on 8 documents, allowed \+-5 %"])
    undecided = run(SCORED.format(ppl=4.9), ppl_tolerance=5)
    undecided.assert_outcomes(xfailed=1)
    undecided.stdout.re_match_lines([r"XFAIL .* inconclusive: perplexity \+4\.9 %.*"])
    run(GATE, ppl_tolerance="100000").assert_outcomes(passed=1)


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
    assert benchmark["stats"]["rounds"] == 5
    assert benchmark["extra_info"]["stopped"] == "time"
    entry = benchmark["extra_info"]["knormpress"]
    assert len(entry["latency"]["candidate"]) == 5
    assert entry["memory"]["candidate_cache_bytes"] < entry["memory"]["baseline_cache_bytes"]


def test_measuring_twice_in_one_test_is_refused(run: Run) -> None:
    result = run(PERF + "    knorm_memory(knorm_press, prompt_tokens=40)\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*measures its memory twice; parametrize the test*"])


EXACT = f"""
def test_bytes(knorm_memory, knorm_press):
    knorm_memory(knorm_press, prompt_tokens=40)

{GATE}
"""


def test_a_run_is_compared_with_the_one_before(run: Run, pytester: pytest.Pytester) -> None:
    wide = {"ppl_tolerance": "1e6"}
    first = run(EXACT, "--knorm-compare", **wide)
    first.assert_outcomes(passed=2)
    first.stdout.fnmatch_lines(["2 no-baseline", "no-baseline*test_it.py::test_bytes*"])
    second = run(EXACT, "--knorm-compare", **wide)
    second.assert_outcomes(passed=2)
    second.stdout.fnmatch_lines(["2 ok"])
    third = run(EXACT.replace("test_bytes", "test_size"), "--knorm-compare", **wide)
    third.assert_outcomes(passed=2)
    third.stdout.fnmatch_lines(["1 missing, 1 new, 1 ok"])
    left_out = run(EXACT.replace("test_bytes", "test_size"), "--knorm-compare", "-k", "test_quality", **wide)
    left_out.stdout.fnmatch_lines(["1 ok"])


def test_saving_comparing_and_thresholds_as_settings(run: Run) -> None:
    run(EXACT, ini="knorm_save = true", ppl_tolerance="1e6")
    assert len(History.read(Path(".benchmarks")).entries) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_memory", _wasteful)
        refused = run(EXACT, ini="knorm_compare = true\nknorm_thresholds = bytes=5", ppl_tolerance="1e6")
        allowed = run(EXACT, ini="knorm_compare = true\nknorm_thresholds = bytes=20", ppl_tolerance="1e6")
    allowed.assert_outcomes(passed=2)
    refused.assert_outcomes(passed=1, failed=1)


def test_a_dirty_tree_is_told(run: Run) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org"]
    run(EXACT, ppl_tolerance="1e6")
    for words in (["init", "-q"], ["add", "tox.ini"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = run(EXACT, "--knorm-compare", ppl_tolerance="1e6")
    assert "uncommitted" not in clean.stdout.str()
    Path("tox.ini").write_text("[pytest]\n")
    dirty = run(EXACT, "--knorm-compare", ini="knorm_seconds = 0", ppl_tolerance="1e6")
    dirty.stdout.fnmatch_lines(["the tree has uncommitted changes: this run will not become a baseline", "2 ok"])


def test_saving_alone_judges_nothing(run: Run) -> None:
    result = run(EXACT, "--knorm-save", ppl_tolerance="1e6")
    assert "against the stored runs" not in result.stdout.str()
    assert len(History.read(Path(".benchmarks")).entries) == 2


def test_what_pytest_benchmark_saved_is_a_baseline_too(run: Run) -> None:
    run(PERF, "--benchmark-autosave", "-q")
    result = run(PERF, "--knorm-compare")
    assert "no-baseline" not in result.stdout.str()
    result.stdout.fnmatch_lines(["*bytes      ok *"])


def test_a_regressed_item_fails_and_does_not_become_the_baseline(run: Run) -> None:
    run(EXACT, "--knorm-compare", ppl_tolerance="1e6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_memory", _wasteful)
        for _ in range(2):
            result = run(EXACT, "--knorm-compare", ppl_tolerance="1e6")
            result.assert_outcomes(passed=1, failed=1)
            result.stdout.fnmatch_lines(["regressed: bytes +10.0 %, allowed 0.5 %; against*", "1 regressed, 1 ok"])
    run(EXACT, "--knorm-compare", ppl_tolerance="1e6").assert_outcomes(passed=2)


def _wasteful(*arguments: object, **conditions: object) -> MemoryUse:
    use = measure_memory(*arguments, **conditions)  # type: ignore[arg-type]
    full = isinstance(arguments[1], FullCache)
    return use if full else replace(use, cache_bytes=use.cache_bytes * 110 // 100)


def test_a_store_cut_short_stops_the_run_before_it_measures(run: Run) -> None:
    run(EXACT, "--knorm-compare", ppl_tolerance="1e6")
    (file,) = Path(".benchmarks/knormpress").glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-200])
    result = run(EXACT, "--knorm-compare", ppl_tolerance="1e6")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is no whole JSON" in result.stderr.str() + result.stdout.str()


def test_a_test_can_have_thresholds_of_its_own(run: Run) -> None:
    marked = "import pytest\n\n\n@pytest.mark.knorm_thresholds(bytes=50)\n" + EXACT.lstrip()
    assert run(marked, "--knorm-compare", "--strict-markers", ppl_tolerance="1e6").ret == 0


def test_an_unknown_storage_is_refused(run: Run) -> None:
    result = run(EXACT, "--knorm-save", "--benchmark-storage=elasticsearch+http://x/y")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert os.listdir(".") == ["test_it.py", "tox.ini"] or not Path(".benchmarks/knormpress").exists()


README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_tests_run_as_shown(run: Run) -> None:
    """A stranger's perf test and quality gate, word for word, and under ten lines each."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (shown,) = (block for block in blocks if "def test_" in block)
    assert all(len(test.splitlines()) < 10 for test in shown.split("\n\n\n"))
    result = run(shown, "--knorm-compare", ppl_tolerance="1e6")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["2 no-baseline"])


def plan_file(model_folder, path, layers=(1.0, 0.5, 0.25)):
    from knormpress.fingerprints import model_fingerprint
    from knormpress.models import load_model
    from knormpress.plan import Plan, write_plan
    from knormpress.press import KnormPress

    model = load_model(str(model_folder), device=torch.device("cpu")).model
    named = {"name": "tiny", "dtype": "float32", "fingerprint": model_fingerprint(model)}
    press = KnormPress(layer_keep_ratios=layers, prune_after=16)
    write_plan(Plan(press, named, {"ppl": 5.0, "passkey": None}, {}, {}), path)
    return path


def test_a_plan_takes_the_place_of_the_keep_ratios(run: Run, model_folder, tmp_path):
    path = plan_file(model_folder, tmp_path / "plan.json")
    source = prints("knorm_press.layer_keep_ratios", "knorm_press", "knorm_bench")
    result = run(source, plan=path, keep_ratios="0.9,0.5")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*seen: (1.0, 0.5, 0.25)*", "PASSED*[[]*plan[]]*"])


def test_a_plan_for_another_model_is_refused(run: Run, model_folder, tmp_path):
    path = plan_file(model_folder, tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "f'))
    result = run(prints("knorm_bench.layers", "knorm_press", "knorm_bench"), plan=path)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*is a plan for tiny in float32*not for this model*"])


def test_a_plan_that_is_not_there_is_told_before_anything_runs(run: Run):
    result = run(prints("1"), plan="none.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no plan can be read from none.json*"])


PASSKEY_GATE = "def test_it(knorm_passkey_gate):\n    knorm_passkey_gate({})\n"


@pytest.mark.parametrize(
    ("found", "outcome", "message"),
    [
        ((40, 40), {"passed": 1}, "PASSED*"),
        (
            (30, 40),
            {"failed": 1},
            "*30 of the 40 passkeys found that the full cache finds: 75 % (60..86), wanted 90 %*",
        ),
        ((38, 40), {"xfailed": 1}, "*inconclusive: 38 of the 40*"),
        ((0, 0), {"xfailed": 1}, "*the full cache found no passkey*"),
    ],
)
def test_the_passkey_gate(run: Run, found, outcome, message):
    result = run(PASSKEY_GATE.format(found))
    result.assert_outcomes(**outcome)
    result.stdout.fnmatch_lines([message])


def test_the_passkey_gate_asks_the_method(run: Run):
    source = "def test_it(knorm_passkeys, knorm_press):\n    print('seen:', knorm_passkeys([knorm_press], count=2))\n"
    run(source).stdout.fnmatch_lines(["seen: [[](0, 0)[]]"])


def test_the_share_that_the_passkey_gate_wants_can_be_set(run: Run):
    run(PASSKEY_GATE.format((30, 40)), passkey_share="0.5").assert_outcomes(passed=1)


@pytest.mark.parametrize("mark", ["tpot='x'", "tpott=5", "bytes=float('nan')", "'tpot'"])
def test_a_threshold_of_a_mark_that_is_none_is_told_before_anything_runs(run: Run, mark):
    marked = f"import pytest\n\n\n@pytest.mark.knorm_thresholds({mark})\n" + EXACT.lstrip()
    result = run(marked, "--knorm-compare", ppl_tolerance="1e6")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert re.match(r"ERROR: threshold .* is none; wanted NAME=PERCENT", line)


def test_the_closest_mark_decides(run: Run):
    run(EXACT, "--knorm-compare", ppl_tolerance="1e6")
    marked = "import pytest\n\npytestmark = pytest.mark.knorm_thresholds(bytes={})\n\n"
    marked += "@pytest.mark.knorm_thresholds(bytes={})\n" + EXACT.lstrip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_memory", _wasteful)
        refused = run(marked.format(20, 5), "--knorm-compare", ppl_tolerance="1e6")
        allowed = run(marked.format(5, 20), "--knorm-compare", ppl_tolerance="1e6")
    refused.assert_outcomes(passed=1, failed=1)
    allowed.assert_outcomes(passed=2)


def test_a_test_that_changes_the_folder_is_stored_and_compared_all_the_same(run: Run):
    moved = EXACT.replace("knorm_press):", "knorm_press, monkeypatch, tmp_path):\n    monkeypatch.chdir(tmp_path)")
    moved = moved.partition("def test_quality")[0]
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    run(moved, "--knorm-compare").assert_outcomes(passed=1)
    second = run(moved, "--knorm-compare")
    second.assert_outcomes(passed=1)
    second.stdout.fnmatch_lines(["1 ok"])


def test_a_storage_that_is_no_folder_is_refused(run: Run):
    Path(".benchmarks").touch()
    result = run(EXACT, "--knorm-save")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: entries can't be stored in */.benchmarks, which is no folder*"])


def test_what_lf_passes_over_has_not_vanished(run: Run):
    Path("test_other.py").write_text(EXACT.partition("def test_quality")[0])
    fails_when_told = EXACT + "\n\ndef test_fails():\n    assert not __import__('os').getenv('FAIL')\n"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FAIL", "1")
        run(fails_when_told, "-p", "cacheprovider", "--knorm-compare", ppl_tolerance="1e6")
    last = run(fails_when_told, "-p", "cacheprovider", "--lf", "--knorm-compare", ppl_tolerance="1e6")
    last.assert_outcomes(passed=1)
    last.stdout.no_fnmatch_line("*missing*")


@pytest.mark.parametrize("option", ["--ignore=test_other.py", "--ignore-glob=*_other.py"])
def test_a_file_that_is_ignored_has_not_vanished(run: Run, option: str):
    Path("test_other.py").write_text(EXACT.partition("def test_quality")[0])
    run(EXACT, "--knorm-compare", ppl_tolerance="1e6").assert_outcomes(passed=3)
    run(EXACT, "--knorm-compare", option, ppl_tolerance="1e6").stdout.fnmatch_lines(["2 ok"])
