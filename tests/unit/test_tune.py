"""The search for a plan, whole, on tiny models: what it measures, what it leaves behind, and what it refuses."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen3Config, set_seed

import knormpress.tune
from knormpress import bench as benches
from knormpress.bench import Bench
from knormpress.cli import main
from knormpress.corpora import load_corpus
from knormpress.errors import KnormError
from knormpress.methods import FullCache
from knormpress.metrics import prefill, score_document
from knormpress.metrics.passkey import passkey_prompts
from knormpress.plan import read_plan
from knormpress.press import KnormPress
from knormpress.probes import Damage, Notes, Probes
from knormpress.progress import Progress
from knormpress.records import read_records
from knormpress.tune import Targets, _TimeIsUp, tune
from tests.strategies import tiny_model
from tests.tiny_folder import save_model, save_text

CPU = torch.device("cpu")
CONTEXT = 512
LOOSE = Targets(ppl=60.0, passkey=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tune")
    save_text(path / "text.txt", characters=14_000)
    return save_model(path, positions=2048)


@pytest.fixture(scope="module")
def bench(folder):
    return Bench.open(str(folder), load_corpus(str(folder / "text.txt")), device=CPU, dtype="float32")


@pytest.fixture(scope="module")
def tuned(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    return tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0), path


def test_the_plan_keeps_less_and_is_on_disk(tuned, bench):
    plan, path = tuned
    assert read_plan(path) == plan
    assert plan.mean_keep < 0.9
    assert KnormPress.from_plan(path, bench.model) == plan.press
    assert len(plan.press.layer_keep_ratios) == bench.layers
    assert plan.calibration["documents"] == 6
    assert plan.held_out["documents"] == 8
    assert sorted([*plan.calibration["numbers"], *plan.held_out["numbers"]]) == list(range(plan.held_out["cut_into"]))


def test_the_frontier_is_measured_through_each_policy(tuned, bench):
    plan, _ = tuned
    names = [point.name for point in plan.frontier]
    assert names[0] == "tuned"
    assert {"tuned", "uniform", "random", "recent-window", "keydiff"} <= set(names)
    assert plan.frontier[0].press == plan.press
    texts = bench.documents(length=CONTEXT + 257, count=14)
    unseen = [texts[number] for number in plan.held_out["numbers"]]
    (quality,) = benches.quality(bench, unseen, [plan.press], context=CONTEXT, prefill_chunk=None)
    assert plan.frontier[0].kl == pytest.approx(statistics.fmean(document.kl for document in quality.documents))


def test_a_layer_that_is_kept_whole_keeps_every_token_of_the_map(tuned):
    plan, _ = tuned
    assert len(plan.kept.layers) == 3
    assert len(plan.kept.tokens) == 96
    for ratio, shares in zip(plan.press.layer_keep_ratios, plan.kept.layers, strict=True):
        assert len(shares) == 96
        assert (min(shares) == 1.0) == (ratio == 1.0)


class Counting(Progress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def counted(monkeypatch):
    measured = []
    sound = Probes._measure

    def count(self, press, steer):
        measured.append(press)
        return sound(self, press, steer)

    monkeypatch.setattr(Probes, "_measure", count)
    return measured


def test_the_same_call_measures_nothing_twice(tuned, bench, counted):
    plan, path = tuned
    told = Counting()
    again = tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0, progress=told)
    assert not counted
    assert replace(again, made={}) == replace(plan, made={})
    assert any("going on" in line for line in told.lines)
    assert not any("time was up" in line for line in told.lines)


def test_stopped_it_goes_on_where_it_was(tuned, bench, tmp_path, monkeypatch, counted):
    plan, _ = tuned
    path = tmp_path / "plan.json"
    sound = Probes._measure

    def stop(self, press, steer):
        if len(counted) == 4:
            raise KeyboardInterrupt
        return sound(self, press, steer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probes, "_measure", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0)
    notes = path.with_name("plan.json.search.jsonl")
    with notes.open("a") as file:
        file.write('["half a li')
    before = len(notes.read_text().split("\n")) - 2
    assert before == 3  # the pass to replay is not a measurement of its own
    counted.clear()
    assert replace(tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0), made={}) == replace(plan, made={})
    everything = len(counted)
    counted.clear()
    tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0, fresh=True)
    assert len(counted) == everything + before


def test_a_search_that_was_cut_short_says_so(bench, tmp_path, monkeypatch):
    path, sound = tmp_path / "plan.json", Probes._measure

    def until_a_plan_is_found(self, press, steer):
        if path.exists():
            raise _TimeIsUp
        return sound(self, press, steer)

    monkeypatch.setattr(Probes, "_measure", until_a_plan_is_found)
    told = Counting()
    plan = tune(bench, LOOSE, path, context=CONTEXT, minutes=5.0, progress=told)
    assert min(plan.press.ratios(bench.layers)) < 1.0
    assert any("time was up" in line for line in told.lines)


@pytest.mark.parametrize("what", ["text", "documents", "passkeys"])
def test_what_was_measured_of_other_tokens_is_not_believed(tuned, bench, folder, tmp_path, counted, monkeypatch, what):
    _, path = tuned
    other = bench
    if what == "documents":
        other = replace(bench, ids=bench.ids.flip(0))
    if what == "passkeys":
        monkeypatch.setattr(knormpress.tune, "CALIBRATION_PASSKEYS", 11)
    if what == "text":
        save_text(tmp_path / "other.txt", characters=14_000, seed=5)
        other = Bench.open(str(folder), load_corpus(str(tmp_path / "other.txt")), device=CPU, dtype="float32")
    copied = tmp_path / "plan.json"
    for suffix in ("", ".search.jsonl"):
        copied.with_name(f"plan.json{suffix}").write_bytes(path.with_name(f"plan.json{suffix}").read_bytes())
    tune(other, LOOSE, copied, context=CONTEXT, minutes=5.0)
    assert counted


def test_time_that_is_up_leaves_the_old_plan(tuned, bench, tmp_path):
    _, path = tuned
    old = tmp_path / "plan.json"
    old.write_bytes(path.read_bytes())
    with pytest.raises(KnormError, match="--minutes"):
        tune(bench, LOOSE, old, context=CONTEXT, minutes=1e-6)
    assert old.read_bytes() == path.read_bytes()


def test_what_costs_too_much_whatever_is_dropped_is_told(bench, tmp_path):
    with pytest.raises(KnormError, match="no plan within the targets"):
        tune(bench, Targets(ppl=1e-7), tmp_path / "plan.json", context=CONTEXT, minutes=5.0)
    assert not (tmp_path / "plan.json").exists()


def test_a_model_with_sliding_layers_is_refused(bench, tmp_path):
    with pytest.raises(KnormError, match="layers without full attention"):
        tune(replace(bench, model=tiny_model("gemma3")), LOOSE, tmp_path / "plan.json", context=CONTEXT)


def test_a_context_that_is_never_pruned_is_refused(bench, tmp_path):
    with pytest.raises(KnormError, match="too short to be pruned"):
        tune(bench, LOOSE, tmp_path / "plan.json", context=511)


@pytest.mark.parametrize("targets", [{"ppl": 0}, {"ppl": float("nan")}, {"passkey": 0}, {"passkey": 1.5}])
def test_targets_out_of_range_are_refused(targets):
    with pytest.raises(KnormError, match="target_"):
        Targets(**targets)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt-neox"])
def test_the_probes_measure_what_the_metrics_do(family, folder):
    model = tiny_model(family)
    ids = torch.randint(2, 60, (1, 128 + 33), generator=torch.Generator().manual_seed(2))
    press = KnormPress(layer_keep_ratios=(1.0, 0.5, 0.3), prune_after=64)
    nearly = replace(press, layer_keep_ratios=(1.0, 0.5, 0.8))
    found = score_document(model, ids, FullCache(), [press], context=128)
    rise = statistics.fmean(found.candidates[0].nll) - statistics.fmean(found.baseline_nll)
    with Probes.open(model, [ids], [], context=128) as probes:
        damage = probes.measure(press)
        assert damage.kl == pytest.approx(found.candidates[0].kl, rel=1e-3, abs=1e-7)
        assert damage.nll == pytest.approx(rise, rel=1e-3, abs=1e-6)
        assert (damage.key_nll, damage.found) == (0.0, 1.0)
        assert probes.around(nearly)(press, 2) == damage
        assert probes.measure(nearly) != damage


def test_keys_that_the_full_cache_does_not_find_are_left_out(bench):
    prompts = passkey_prompts(bench.tokenizer, bench.start, count=3, which="calibration", device=CPU)
    cache, key = DynamicCache(config=bench.model.config), []
    with torch.inference_mode():
        prefill(bench.model, prompts[1].text, cache)
        token = prefill(bench.model, prompts[1].question, cache).argmax(-1)
        for _ in range(3):
            key.append(int(token))
            token = prefill(bench.model, token[None], cache).argmax(-1)
    findable = replace(prompts[1], key=torch.tensor(key))
    texts = bench.documents(length=CONTEXT + 33, count=1)
    with Probes.open(bench.model, texts, [prompts[0], findable, prompts[2]], context=CONTEXT) as probes:
        assert probes.passkeys == 1
        assert probes.measure(KnormPress(1.0)).found == 1.0
        assert probes.measure(KnormPress(0.05)).key_nll != 0.0


def test_the_command_and_the_sweep_of_its_plan(folder, tmp_path, capsys):
    plan, text = tmp_path / "plan.json", str(folder / "text.txt")
    given = ["--model", str(folder), "--device", "cpu", "--corpus", text]
    command = ["tune", "--target-ppl", "60%", "--target_passkey", "none", "--minutes", "2", "--context", "512"]
    assert main([*command, *given, "--output", str(plan)]) == 0
    shown = capsys.readouterr().out
    assert "tuned (the plan)" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(plan) not in line)
    press = read_plan(plan).press
    sweep = ["sweep", "--keep_ratios", "0.5", "--samples", "1", "--rounds", "1", "--seconds", "0", "--new-tokens", "2"]
    sweep += ["--prompt-tokens", "512", "--plan", str(plan), "--output", str(tmp_path)]
    assert main([*sweep, *given]) == 0
    records = list(read_records(tmp_path / "results.jsonl"))
    assert [record.policy.layer_keep_ratios for record in records] == [None, press.layer_keep_ratios]
    other = save_model(tmp_path / "other", layers=2, positions=2048)
    given[1] = str(other)
    assert main([*sweep, *given]) == 2
    assert "not for this model" in capsys.readouterr().err


def test_a_tokenizer_that_merges_over_the_seam_still_gives_the_key(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (prompt,) = passkey_prompts(tokenizer, torch.tensor([], dtype=torch.long), count=1, which="held-out", device=CPU)
    together = tokenizer.decode(torch.cat([prompt.question[0], prompt.key]))
    assert together.split()[-1].isdigit()


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_a_search_without_time_is_refused_before_it_begins(bench, tmp_path, minutes):
    with pytest.raises(KnormError, match=r"minutes is .*; wanted a time above 0"):
        tune(bench, LOOSE, tmp_path / "plan.json", context=CONTEXT, minutes=minutes)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_nothing_is_measured(bench, tmp_path, counted):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "plan.json.search.jsonl").mkdir()
    for name, message in (
        ("folder", "a folder; name a file"),
        ("file/plan.json", "choose another --output"),
        ("plan.json", "choose another --output"),
    ):
        with pytest.raises(KnormError, match=message):
            tune(bench, LOOSE, tmp_path / name, context=CONTEXT)
    with pytest.raises(KnormError, match="a folder; name a file"):
        tune(bench, LOOSE, Path("/"), context=CONTEXT)
    assert not counted


def test_passkeys_longer_than_the_model_are_told_before_the_search(bench, tmp_path, counted):
    config = bench.model.config.__class__(**bench.model.config.to_dict() | {"max_position_embeddings": 1200})
    short = replace(bench, model=bench.model.__class__(config))
    with pytest.raises(
        KnormError, match=r"made for 1200 positions, but the passkey prompts take .*--target-passkey none"
    ):
        tune(short, LOOSE, tmp_path / "plan.json", context=CONTEXT)
    assert not list(tmp_path.iterdir())


def test_damage_that_is_no_number_is_within_no_target():
    damage = Damage(kl=0.0, nll=float("nan"), key_nll=0.0, found=1.0)
    assert not Targets(ppl=1e6, passkey=None).met(damage, text=True, keys=True)


def test_what_another_search_writes_into_the_file_is_not_believed(tmp_path):
    path, press = tmp_path / "notes.jsonl", KnormPress(0.5)
    first = Notes(path, {"context": 512})
    second = Notes(path, {"context": 1024})
    first.note(press, Damage(0.1, 0.1, 0.0, 1.0))
    second.note(replace(press, keep_recent=1), Damage(0.2, 0.2, 0.0, 1.0))
    again = Notes(path, {"context": 1024})
    assert again.goes_on
    assert again.get(press) is None
    assert again.get(replace(press, keep_recent=1)) == Damage(0.2, 0.2, 0.0, 1.0)


def test_notes_that_are_no_text_are_begun_anew(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    assert not Notes(path, {"context": 512}).goes_on
    assert Notes(path, {"context": 512}).goes_on
    assert not Notes(path, {"context": 512}, fresh=True).goes_on


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--target-ppl", "5,6", "--target_ppl is '5,6'; wanted one number"),
        ("--target-ppl", "", "--target_ppl is ''; wanted one number"),
        ("--target-passkey", "0.5,2", "--target_passkey is '0.5,2'; wanted one number"),
        ("--output", "plan", "--output is 'plan'; wanted a file whose name ends in .json"),
    ],
)
def test_options_that_are_none_are_one_line(capsys, option, value, message):
    assert main(["tune", option, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


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
    plan = tune(replace(bench, model=model), Targets(ppl=300.0), path, context=CONTEXT, minutes=5.0)
    assert len(plan.press.layer_keep_ratios) == 4
    assert plan.mean_keep < 0.9
    assert KnormPress.from_plan(path, model) == plan.press
    with pytest.raises(KnormError, match="not for this model"):
        KnormPress.from_plan(path, bench.model)
