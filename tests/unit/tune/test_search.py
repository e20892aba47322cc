"""The search for a plan, whole, on tiny models: what it measures, what it leaves behind, and what it refuses."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from knormpress import KnormPress
from knormpress.errors import KnormError
from knormpress.measure.quality import measure_quality
from knormpress.progress import Progress
from knormpress.records.plan import read_plan
from knormpress.tune import search, texts
from knormpress.tune.notes import Damage
from knormpress.tune.place import Here
from knormpress.tune.probes import Probes
from knormpress.tune.search import Targets, _TimeIsUp, tune
from knormpress.tune.work import Work
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus
from knormpress.workload.tasks.haystack import haystacks
from tests.answered import answered
from tests.strategies import tiny_model
from tests.tiny_folder import save_text

CONTEXT, SEEN, UNSEEN = 512, 32, 64
LOOSE = Targets(ppl=60.0, retrieval=0.9)


@pytest.fixture(scope="module", autouse=True)
def _few():
    """A quarter of the tokens that are scored, two tasks in filler, and one of the policies beside the plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "TASKS", ("passkey", "multikey-filler"))
        numbers = {"CALIBRATION_SCORED": SEEN, "SCORED": UNSEEN, "CALIBRATION_TEXTS": 1, "HELD_OUT_TEXTS": 2}
        for name, number in numbers.items():
            patch.setattr(texts, name, number)
        for name in ("_COMPARED", "_UNIFORM", "_OTHER_RATIOS"):
            patch.setattr(search, name, (0.5,))
        yield


def findable(bench, tasks, *, count, which):
    """The usual texts, with keys that this model finds."""
    return [answered(bench.model, prompt) for prompt in haystacks(bench, tasks, count=count, which=which)]


@pytest.fixture(scope="module")
def tuned(bench, tmp_path_factory, _few):
    """A plan, and where it is."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    return tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0), path


@pytest.fixture
def unmeasured(monkeypatch):
    """Spare a test what comes behind the search."""
    monkeypatch.setattr(Here, "report", lambda *_: ())


def found_by(plan):
    """What the search found, without what was measured behind it and when."""
    return plan.model_copy(update={"frontier": (), "made": {}})


def test_the_plan_keeps_less_and_is_on_disk(tuned, bench):
    plan, path = tuned
    assert read_plan(path) == plan
    assert plan.mean_keep < 0.9
    assert KnormPress.from_plan(path, bench.model) == plan.press
    assert len(plan.press.layer_keep_ratios) == len(plan.kept.layers) == bench.layers
    assert plan.calibration["documents"] == 6
    assert plan.held_out["documents"] == 8
    assert sorted([*plan.calibration["numbers"], *plan.held_out["numbers"]]) == list(range(plan.held_out["cut_into"]))


def test_the_frontier_is_measured_through_each_policy_on_what_the_search_did_not_see(tuned, bench):
    plan, _ = tuned
    names = [point.name for point in plan.frontier]
    assert names == ["tuned", "tuned", "uniform", "random", "recent-window", "keydiff"]
    assert plan.is_own(plan.frontier[0])
    texts = bench.documents(length=CONTEXT + UNSEEN + 1, count=14)
    unseen = [texts[number] for number in plan.held_out["numbers"]]
    (quality,) = measure_quality(bench.model, [KnormPress.of(plan.press)], unseen, context=CONTEXT)
    documents = [document.kl for document in quality.documents]
    assert plan.frontier[0].kl == pytest.approx(statistics.fmean(documents))


@pytest.mark.usefixtures("unmeasured")
def test_the_plan_is_within_both_targets_on_what_the_search_saw(bench, tmp_path, monkeypatch):
    """And less is kept than by a plan that is not."""
    monkeypatch.setattr(texts, "haystacks", findable)
    targets = Targets(ppl=20.0, retrieval=0.2)
    plan = tune(bench, targets, tmp_path / "plan.json", context=CONTEXT, minutes=5.0)
    documents = bench.documents(length=CONTEXT + UNSEEN + 1, count=14)
    seen = [documents[number][:, : CONTEXT + SEEN + 1] for number in plan.calibration["numbers"]]
    prompts = findable(bench, texts.TASKS, count=1, which="calibration")
    with Probes.open(bench.model, seen, prompts, context=CONTEXT) as probes:
        assert probes.items == 5
        assert targets.met(probes.measure(KnormPress.of(plan.press)))
        assert not targets.met(probes.measure(replace(plan.press, layer_keep_ratios=(0.1,) * 3)))
    assert plan.mean_keep < 1.0


def test_the_scores_of_the_plan_are_those_that_were_allowed(bench, tmp_path, unmeasured):
    """And the file of the plan says which layer has which."""
    for scores, wanted in ((("highest-norm", "knorm"), None), (("keydiff",), "keydiff")):
        path = tmp_path / f"{scores[0]}.json"
        plan = tune(bench, LOOSE, path, scores=scores, context=CONTEXT, minutes=5.0)
        named = plan.press.scores(bench.layers)
        assert set(named) <= set(scores)
        assert wanted is None or set(named) == {wanted}
        assert KnormPress.from_plan(path, bench.model).scores(bench.layers) == named


class Told(Progress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def counted(monkeypatch):
    """The policies that were measured."""
    measured = []
    sound = Probes._measure

    def count(self, press, *rest):
        measured.append(press)
        return sound(self, press, *rest)

    monkeypatch.setattr(Probes, "_measure", count)
    return measured


@pytest.mark.usefixtures("unmeasured")
def test_the_same_call_measures_nothing_twice(tuned, bench, tmp_path, counted):
    plan, path = tuned
    for file in path.parent.iterdir():
        shutil.copy(file, tmp_path)
    told = Told()
    again = tune(bench, LOOSE, tmp_path / "plan.json", context=CONTEXT, minutes=5.0, progress=told)
    assert not counted
    assert found_by(again) == found_by(plan)
    assert any("--fresh" in line for line in told.lines)
    assert not any("--minutes" in line for line in told.lines)


@pytest.mark.usefixtures("unmeasured")
def test_stopped_it_goes_on_where_it_was(tuned, bench, tmp_path, counted):
    plan, _ = tuned
    path = tmp_path / "plan.json"
    sound = Probes._measure

    def stop(self, press, *rest):
        if len(counted) == 4:
            raise KeyboardInterrupt
        return sound(self, press, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probes, "_measure", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0)
    notes = path.with_name("plan.json.search.jsonl")
    before = len(notes.read_text().split("\n")) - 2
    assert before == 3  # the pass to replay is not a measurement of its own
    counted.clear()
    assert found_by(tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0)) == found_by(plan)
    everything = len(counted)
    counted.clear()
    tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0, fresh=True)
    assert len(counted) == everything + before


@pytest.mark.usefixtures("unmeasured")
def test_a_search_that_was_cut_short_says_so(bench, tmp_path, monkeypatch):
    path, sound = tmp_path / "plan.json", Probes._measure

    def until_a_plan_is_found(self, press, *rest):
        if path.exists():
            raise _TimeIsUp
        return sound(self, press, *rest)

    monkeypatch.setattr(Probes, "_measure", until_a_plan_is_found)
    told = Told()
    plan = tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0, progress=told)
    assert min(plan.press.ratios(bench.layers)) < 1.0
    assert any("--minutes" in line for line in told.lines)


@pytest.mark.usefixtures("unmeasured")
def test_plans_that_were_tried_before_the_time_ran_out_count(bench, tmp_path, monkeypatch):
    """The time often runs out before the first bisection has ended."""
    sound, tried = Probes.measure, []

    def two(self, press):
        if len(tried) == 2:
            raise _TimeIsUp
        tried.append(press)
        return sound(self, press)

    monkeypatch.setattr(Probes, "measure", two)
    path = tmp_path / "plan.json"
    plan = tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0)
    assert KnormPress.of(plan.press) == tried[-1]
    assert read_plan(path) == plan


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("layer_seconds", [5.0, 9.0])
def test_a_slow_machine_gets_a_plan_too(bench, tmp_path, monkeypatch, layer_seconds):
    """Where layers alone take the time of the search and some of the report's, four plans are tried behind them."""
    told, tried, layers = Told(), [], []
    around, measure = Probes.around, Probes.measure
    passed, clock = [0.0], time.perf_counter
    alone = bench.layers * len(search.SCORES)
    minutes = alone * 10.0 / 60

    def slow(self, base, presses):
        for found in around(self, base, presses):
            layers.append(found)
            passed[0] += layer_seconds
            yield found

    def counted(self, press):
        tried.append(press)
        passed[0] += 60 * minutes
        return measure(self, press)

    monkeypatch.setattr(search.time, "perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr(Work, "end_of_search", lambda self, began, seconds, read: began + seconds / 2)
    monkeypatch.setattr(Probes, "around", slow)
    monkeypatch.setattr(Probes, "measure", counted)
    plan = tune(bench, LOOSE, tmp_path / "plan.json", context=CONTEXT, minutes=minutes, progress=told)
    assert len(layers) == alone
    assert len(tried) == 4
    assert plan.mean_keep < 0.9
    assert any("--minutes" in line for line in told.lines)


@pytest.mark.parametrize("what", ["text", "documents", "items"])
def test_what_was_measured_of_other_tokens_is_not_believed(tuned, bench, folder, tmp_path, monkeypatch, what):
    for file in tuned[1].parent.iterdir():
        shutil.copy(file, tmp_path)
    other = bench
    if what == "documents":
        other = replace(bench, ids=bench.ids.flip(0))
    if what == "items":
        monkeypatch.setattr(texts, "CALIBRATION_TEXTS", 2)
    if what == "text":
        save_text(tmp_path / "other.txt", characters=14_000, seed=5)
        corpus = load_corpus(str(tmp_path / "other.txt"))
        other = Bench.open(str(folder), corpus, device=torch.device("cpu"), dtype="float32")

    def measure(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Probes, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tune(other, LOOSE, tmp_path / "plan.json", context=CONTEXT, minutes=5.0)


def test_time_that_is_up_leaves_the_old_plan(tuned, bench, tmp_path):
    _, path = tuned
    old = tmp_path / "plan.json"
    old.write_bytes(path.read_bytes())
    with pytest.raises(KnormError, match="--minutes"):
        tune(bench, LOOSE, old, context=CONTEXT, minutes=1e-6)
    assert old.read_bytes() == path.read_bytes()


def test_what_costs_too_much_whatever_is_dropped_is_told(bench, tmp_path):
    with pytest.raises(KnormError, match="--target-ppl"):
        tune(bench, Targets(ppl=1e-7), tmp_path / "plan.json", context=CONTEXT, minutes=5.0)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.usefixtures("unmeasured")
def test_the_whole_path_on_another_architecture(bench, tmp_path):
    set_seed(1)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        # Keys that are normalised have equal norms until their weights differ.
        torch.nn.init.uniform_(parameter, 0.2, 2.0) if "k_norm" in name else parameter.data.mul_(8)
    path = tmp_path / "plan.json"
    plan = tune(replace(bench, model=model), Targets(300.0, None), path, context=CONTEXT, minutes=5.0)
    assert len(plan.press.layer_keep_ratios) == 4
    assert plan.mean_keep < 0.9
    assert KnormPress.from_plan(path, model) == plan.press
    with pytest.raises(KnormError, match=r"plan\.json"):
        KnormPress.from_plan(path, bench.model)


def refused(bench, path, message, **options):
    """It is refused in one line before anything is measured or written."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(KnormError, match=message) as caught:
        tune(bench, LOOSE, path, **{"context": CONTEXT} | options)
    assert "\n" not in str(caught.value)
    assert before is None or sorted(path.parent.iterdir()) == before


def test_what_can_not_be_tuned_is_told_before_the_search(bench, tmp_path, counted):
    path = tmp_path / "plan.json"
    refused(replace(bench, model=tiny_model("gemma3")), path, "full attention")
    refused(bench, path, "511 tokens .*at least 512", context=511)
    for minutes in (0.0, -1.0, math.nan):
        refused(bench, path, f"minutes is {minutes}; wanted", minutes=minutes)
    config = bench.model.config.__class__(**bench.model.config.to_dict() | {"max_position_embeddings": 1200})
    short = replace(bench, model=bench.model.__class__(config))
    refused(short, path, r"1200 positions.*--target-retrieval none")
    assert not counted


def test_where_nothing_can_be_written_nothing_is_measured(bench, tmp_path, counted):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "plan.json.search.jsonl").mkdir()
    refused(bench, tmp_path / "folder", "a folder")
    refused(bench, Path("/"), "a folder")
    refused(bench, tmp_path / "file" / "plan.json", "--output")
    refused(bench, tmp_path / "plan.json", "--output")
    assert not counted


class TestTargets:
    @pytest.mark.parametrize("targets", [{"ppl": 0}, {"ppl": math.nan}, {"retrieval": 0}, {"retrieval": 1.5}])
    def test_out_of_range_they_are_refused(self, targets):
        ((name, value),) = targets.items()
        with pytest.raises(KnormError, match=f"target_{name} is {value}; wanted"):
            Targets(**targets)

    @pytest.mark.parametrize(
        ("damage", "within"),
        [
            (Damage(kl=0.0, nll=0.0, answer_nll=0.0, found=1.0), True),
            (Damage(kl=0.0, nll=math.log1p(0.05), answer_nll=9.0, found=0.9), True),
            (Damage(kl=2 * math.log1p(0.05) + 1e-9, nll=0.0, answer_nll=0.0, found=1.0), False),
            (Damage(kl=math.nan, nll=0.0, answer_nll=0.0, found=1.0), False),
            (Damage(kl=0.0, nll=math.log1p(0.05) + 1e-9, answer_nll=0.0, found=1.0), False),
            (Damage(kl=0.0, nll=0.0, answer_nll=0.0, found=0.89), False),
            (Damage(kl=0.0, nll=math.nan, answer_nll=0.0, found=1.0), False),
            (Damage(kl=0.0, nll=0.0, answer_nll=0.0, found=math.nan), False),
        ],
    )
    def test_up_to_their_limits_they_are_met(self, damage, within):
        """Perplexity and found items decide, as the options say; the rest guides the search."""
        assert Targets(ppl=5.0, retrieval=0.9).met(damage) == within

    def test_where_nothing_is_asked_only_the_text_counts(self):
        assert Targets(retrieval=None).met(Damage(kl=0.0, nll=0.0, answer_nll=9.0, found=0.0))
