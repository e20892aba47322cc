"""The search for the plan of least keep within a loss that the user allows, and what it is worth on unseen text.

First each layer alone is pruned and what that does is measured: the damages nearly add up, so that the best plan of any
size can be read off (``search``). Plans are then tried whole, and with the time that is left the layers are measured
again, around the best plan. What the search saw is no measure of the plan: that is taken on other documents and keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from knormpress import __version__
from knormpress.bench import Bench
from knormpress.errors import KnormError
from knormpress.fingerprints import model_fingerprint
from knormpress.held_out import Tried, kept_tokens, mean_keep, measure_unseen
from knormpress.plan import Plan, Sensitivities, write_plan
from knormpress.press import KnormPress
from knormpress.probes import Damage, Notes, Probes
from knormpress.progress import Progress, ticking
from knormpress.search import Curve, least_keep, plan_at

__all__ = ["Targets", "tune"]

# Of so many documents spread over the text, every other one is calibrated on until there are six.
_CUT = 14
_SEEN = tuple(range(1, 12, 2))
_UNSEEN = tuple(number for number in range(_CUT) if number not in _SEEN)
CALIBRATION_SCORED, SCORED = 128, 256
CALIBRATION_PASSKEYS, HELD_OUT_PASSKEYS = 12, 40

# What each layer alone is pruned to. Lower ones would leave little more than the newest tokens of a short text.
_RATIOS = (0.1, 0.4)
_RECENT, _OTHER_RECENT = 32, (16, 64)
# How much a passkey weighs beside the text, each in units of what is allowed.
_WEIGHTS = (0.1, 0.3, 1.0)
_STEP = 0.6
_COMPARED = (0.6, 0.5, 0.45, 0.4, 0.3)
_UNIFORM = (0.9, 0.8, 0.7, 0.5)
_OTHERS, _OTHER_RATIOS = ("random", "recent-window", "keydiff"), (0.7, 0.5)


@dataclass(frozen=True)
class Targets:
    """What a plan may cost.

    Args:
        ppl: rise of perplexity in % (> 0).
        passkey: share (in (0, 1]) of the passkeys that must still be found; None where that is no matter.

    Raises:
        KnormError: a value is out of its range.
    """

    ppl: float = 5.0
    passkey: float | None = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.ppl < math.inf:
            raise KnormError(f"target_ppl is {self.ppl}; wanted a rise of perplexity in %, such as 5")
        if self.passkey is not None and not 0 < self.passkey <= 1:
            raise KnormError(f"target_passkey is {self.passkey}; wanted a share above 0 and at most 1, or none")

    @property
    def text_nats(self) -> float:
        """What perplexity may rise, in nats a token."""
        return math.log1p(self.ppl / 100)

    @property
    def key_nats(self) -> float:
        """What a key's negative log-likelihood may rise: its probability falls to the share asked for, not below."""
        return -math.log(min(self.passkey or 1.0, 0.99))

    def met(self, damage: Damage, *, text: bool, keys: bool) -> bool:
        """Whether ``damage`` is within the targets that are asked about."""
        if text and not damage.text <= self.text_nats:  # NaN is not within
            return False
        return not keys or self.passkey is None or (damage.found >= self.passkey and damage.key_nll <= self.key_nats)


class _TimeIsUp(Exception):
    pass


def tune(
    bench: Bench,
    targets: Targets,
    path: Path,
    *,
    context: int = 1_024,
    minutes: float = 4.0,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Search, then measure on unseen documents and keys; the best plan so far is always at ``path``.

    Measurements of the search are kept beside ``path``: the same call goes on where it was stopped.

    Args:
        bench: the model and the text.
        targets: what a plan may cost.
        path: the plan file.
        context: tokens (>= the policy's prune_after) in front of the scored ones.
        minutes: time for the search (> 0); the measurement at the end comes on top.
        fresh: forget what was measured before.
        progress: told of every step.

    Raises:
        KnormError: ``minutes`` is not above 0, nothing can be written at ``path``, the text is too short, the context
            is too short to be pruned, the model has layers without full attention or too few positions for passkeys,
            or even pruning hardly at all costs more than allowed; what was at ``path`` is left there.
    """
    progress = progress or Progress()
    base = KnormPress(layer_keep_ratios=(1.0,) * bench.layers, keep_recent=_RECENT)
    if not minutes > 0:
        raise KnormError(f"minutes is {minutes}; wanted a time above 0, such as 5")
    if not path.name or path.is_dir():
        raise KnormError(f"the plan can't be written to {path}, a folder; name a file in it, such as plan.json")
    if context < base.prune_after:
        raise KnormError(f"a context of {context} tokens is too short to be pruned; wanted at least {base.prune_after}")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=bench.model.config).layers):
        raise KnormError(f"{bench.model_info.name} has layers without full attention, for which no plan can be tuned")
    seen, unseen = _split(bench, context)
    prompts = []
    if targets.passkey is not None:
        bench.passkeys(count=HELD_OUT_PASSKEYS, which="held-out")  # what is too long for the model is told now
        prompts = bench.passkeys(count=CALIBRATION_PASSKEYS, which="calibration")
    model = model_fingerprint(bench.model)
    identity = {
        "model": model,
        "tokens": _hash_of([*seen, *(part for prompt in prompts for part in (prompt.text, prompt.fed))]),
        "context": context,
        "knormpress": __version__,
    }
    notes = Notes(path.with_name(f"{path.name}.search.jsonl"), identity, fresh=fresh)
    if notes.goes_on:
        progress.say(f"going on with what was measured before, in {notes.path}; --fresh forgets it")
    plan = Plan(
        press=base,
        model={"name": bench.model_info.name, "dtype": bench.model_info.dtype, "fingerprint": model},
        targets={"ppl": targets.ppl, "passkey": targets.passkey},
        calibration=_text_of(bench, context, CALIBRATION_SCORED, _SEEN, len(prompts)),
        held_out=_text_of(bench, context, SCORED, _UNSEEN, HELD_OUT_PASSKEYS if prompts else 0),
        made={"tuned": datetime.now(timezone.utc).isoformat(timespec="seconds"), "knormpress": __version__},
    )
    with Probes.open(
        bench.model,
        seen,
        prompts,
        context=context,
        after_each=ticking(progress, len(seen) + len(prompts), "reading the calibration texts"),
    ) as probes:
        search = _Search(
            bench=bench,
            probes=probes,
            notes=notes,
            targets=targets,
            plan=plan,
            path=path,
            progress=progress,
            minutes=minutes,
        )
        search.run()
    plan = search.plan
    tried = _compared(search)
    asked = HELD_OUT_PASSKEYS if search.with_keys else 0
    frontier = measure_unseen(bench, tried, unseen, context=context, passkeys=asked, progress=progress)
    plan = replace(plan, frontier=frontier, kept=kept_tokens(bench, plan.press, unseen[0][:, :context]))
    write_plan(plan, path)
    return plan


class _Search:
    """The search under way: ``plan`` is the best so far, ``alone`` what each target alone would let one keep."""

    def __init__(
        self,
        *,
        bench: Bench,
        probes: Probes,
        notes: Notes,
        targets: Targets,
        plan: Plan,
        path: Path,
        progress: Progress,
        minutes: float,
    ) -> None:
        self.bench, self.probes, self.notes, self.targets = bench, probes, notes, targets
        self.plan, self.path, self.progress = plan, path, progress
        self.alone: dict[str, KnormPress] = {}
        self.text: list[Curve] = []
        self.keys: list[Curve] = []
        self.weight = 0.0
        self.end = time.perf_counter() + 60 * minutes
        self.with_keys = probes.passkeys > 0
        if targets.passkey is not None and not self.with_keys:
            progress.say("the full cache finds no passkey, so that there is none to lose: only perplexity counts")

    def run(self) -> None:
        """Find the plans; raises where none is within the targets."""
        whole_round = False
        with suppress(_TimeIsUp):
            self._measure_layers()
            for weight in _WEIGHTS if self.with_keys else (0.0,):
                self._find(weight, self.plan.press)
            if self.with_keys:
                for name, weight in (("perplexity", 0.0), ("passkeys", math.inf)):
                    self._find(weight, self.plan.press, alone=name)
            for recent in _OTHER_RECENT:
                self._find(self.weight, replace(self.plan.press, keep_recent=recent))
            whole_round = True
            while self._refine():
                pass
        if self.plan.mean_keep == 1.0:
            raise KnormError(
                "no plan within the targets was found"
                + (" in the time" if time.perf_counter() > self.end else "")
                + "; allow more by --target-ppl or --target-passkey, or give it more --minutes"
            )
        if not whole_round:
            self.progress.say(
                "the time was up before all was tried once: run again, it goes on, or give it more --minutes"
            )

    def curves(self, weight: float) -> list[Curve]:
        """The layers' damages as one: the text's, and the passkeys' by ``weight``, in units of what is allowed."""
        text, keys = (0.0, 1.0) if weight == math.inf else (1.0, weight)
        text, keys = text / self.targets.text_nats, keys / self.targets.key_nats
        return [
            Curve(one.ratios, tuple(text * t + keys * k for t, k in zip(one.damage, other.damage, strict=True)))
            for one, other in zip(self.text, self.keys, strict=True)
        ]

    def _measure(self, press: KnormPress, how: Callable[[], Damage]) -> Damage:
        known = self.notes.get(press)
        if known is None:
            if time.perf_counter() > self.end:
                raise _TimeIsUp
            known = how()
            self.notes.note(press, known)
        return known

    def _measure_layers(self) -> None:
        base = self.plan.press
        layers = self.bench.layers
        tick = ticking(self.progress, layers * len(_RATIOS), "each layer alone")
        found = self._around(base, [(layer, ratio) for ratio in _RATIOS for layer in range(layers)], tick)
        ratios = (*_RATIOS, 1.0)
        rows = [[found[layer, ratio] for ratio in _RATIOS] for layer in range(layers)]
        text = [tuple(d.text for d in row) for row in rows]
        keys = [tuple(max(d.key_nll, 0.0) for d in row) for row in rows]
        self.text = [Curve(ratios, (*damage, 0.0)) for damage in text]
        self.keys = [Curve(ratios, (*damage, 0.0)) for damage in keys]
        self.plan = replace(self.plan, sensitivities=Sensitivities(_RATIOS, tuple(text), tuple(keys)))

    def _around(
        self, base: KnormPress, changes: Sequence[tuple[int, float]], tick: Callable[[], None]
    ) -> dict[tuple[int, float], Damage]:
        """What it does to change one layer's ratio of ``base``, for each (layer, ratio)."""
        found = {}
        measure: Callable[[KnormPress, int], Damage] | None = None
        for layer, ratio in changes:
            ratios = list(base.layer_keep_ratios or ())
            ratios[layer] = ratio
            press = replace(base, layer_keep_ratios=tuple(ratios))
            if measure is None and self.notes.get(press) is None:
                measure = self.probes.around(base)
            found[layer, ratio] = self._measure(press, partial(measure, press, layer) if measure else _unreachable)
            tick()
        return found

    def _find(self, weight: float, press: KnormPress, alone: str = "") -> None:
        """Try plans of ever fewer tokens; the best so far, of all targets or one alone, gives way to a better one."""
        best = self.alone.get(alone, None) if alone else self.plan.press
        high = 0.9 if best is None else min(0.9, mean_keep(best, self.bench.layers) - 0.01)
        doing = f"plans within {alone or 'the targets'}"
        self.progress.step(0, 1, doing)

        def is_good(ratios: tuple[float, ...]) -> bool:
            tried = replace(press, layer_keep_ratios=ratios)
            damage = self._measure(tried, lambda: self.probes.measure(tried))
            return self.targets.met(damage, text=alone != "passkeys", keys=alone != "perplexity")

        low = max(_RATIOS[0], high - 0.2) if high < 0.9 else _RATIOS[0]
        ratios = least_keep(self.curves(weight), is_good, low=low, high=high)
        if ratios is None:
            return
        found = replace(press, layer_keep_ratios=ratios)
        if alone:
            self.alone[alone] = found
        else:
            self.weight = weight
            self.plan = replace(self.plan, press=found)
            write_plan(self.plan, self.path)

    def _refine(self) -> bool:
        """Measure the layers again around the best plan, and look for a better one near it; whether there was one."""
        base = self.plan.press
        ratios = base.layer_keep_ratios or ()
        moves = []
        for layer, ratio in enumerate(ratios):
            for moved in (max(_RATIOS[0], round(ratio * _STEP, 3)), min(1.0, round(ratio / _STEP, 3))):
                if moved != ratio:
                    moves.append((layer, moved))
        here = self._measure(base, lambda: self.probes.measure(base))
        found = self._around(base, moves, ticking(self.progress, len(moves), "the layers around the best plan"))
        text, keys = [], []
        for layer, ratio in enumerate(ratios):
            steps = {moved: found[layer, moved] for owner, moved in moves if owner == layer} | {ratio: here}
            places = tuple(sorted(steps))
            text.append(Curve(places, tuple(steps[place].text - here.text for place in places)))
            keys.append(Curve(places, tuple(steps[place].key_nll - here.key_nll for place in places)))
        before, self.text, self.keys = (self.text, self.keys), text, keys
        try:
            self._find(self.weight, base)
        finally:
            self.text, self.keys = before
        return self.plan.press != base


def _compared(search: _Search) -> list[Tried]:
    """The plan, what each target alone would let one keep, other sizes by the same curves, and other methods."""
    press, curves = search.plan.press, search.curves(search.weight)
    tuned = [Tried("tuned", press)]
    tuned += [Tried(f"tuned for {name}", alone) for name, alone in search.alone.items()]
    tuned += [Tried("tuned", replace(press, layer_keep_ratios=plan_at(curves, keep))) for keep in _COMPARED]
    uniform = [Tried("uniform", KnormPress(keep)) for keep in _UNIFORM]
    others = [Tried(name, KnormPress(keep), name, passkeys=keep < 0.7) for name in _OTHERS for keep in _OTHER_RATIOS]
    return [*tuned, *uniform, *others]


def _split(bench: Bench, context: int) -> tuple[list[Tensor], list[Tensor]]:
    """Documents to calibrate on, and others to measure on: every other one of those that are spread over the text."""
    texts = bench.documents(length=context + SCORED + 1, count=_CUT)
    short = context + CALIBRATION_SCORED + 1
    return [texts[i][:, :short] for i in _SEEN], [texts[i] for i in _UNSEEN]


def _hash_of(texts: Sequence[Tensor]) -> str:
    """SHA-256 of token ids, so that another text is told, and another tokenizer too."""
    return hashlib.sha256(json.dumps([ids.tolist() for ids in texts]).encode()).hexdigest()


def _text_of(bench: Bench, context: int, scored: int, numbers: tuple[int, ...], passkeys: int) -> dict[str, object]:
    return {
        "text": bench.text_info.name,
        "sha256": bench.text_info.sha256,
        "documents": len(numbers),
        "numbers": list(numbers),
        "cut_into": _CUT,
        "context": context,
        "scored": scored,
        "passkeys": passkeys,
    }


def _unreachable() -> Damage:
    raise AssertionError("what is noted is not measured")
