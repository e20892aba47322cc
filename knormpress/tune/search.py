"""Search for the plan that keeps the fewest tokens within the user's targets, and measure it on unseen text.

First each layer is pruned alone and the damage is measured. The damages nearly add up, so the best plan of any size can
be computed from them (``allocation``). Then whole plans are tried. In the remaining time the layers are measured again,
around the best plan. The result is measured on other documents and passkeys than those of the search.
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
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.errors import KnormError
from knormpress.methods.knorm import KnormPress
from knormpress.progress import Progress, ticking
from knormpress.records.plan import Plan, PlannedModel, PlannedTargets, Sensitivities, write_plan
from knormpress.tune.allocation import Curve, least_keep, plan_at
from knormpress.tune.notes import Damage, Notes
from knormpress.tune.probes import Probes
from knormpress.tune.unseen import Tried, kept_tokens, measure_unseen
from knormpress.workload.bench import Bench
from knormpress.workload.tasks.haystack import Haystack, haystacks

__all__ = ["Targets", "tune"]

# The text is cut into 14 documents; six of them, every other one, are used for calibration.
_CUT = 14
_SEEN = tuple(range(1, 12, 2))
_UNSEEN = tuple(number for number in range(_CUT) if number not in _SEEN)
CALIBRATION_SCORED, SCORED = 128, 256
CALIBRATION_PASSKEYS, HELD_OUT_PASSKEYS = 12, 40

# Each layer alone is pruned to these ratios. Lower ones would leave little more than the newest tokens of a short text.
_RATIOS = (0.1, 0.4)
_RECENT, _OTHER_RECENT = 32, (16, 64)
# Weights of passkey damage relative to text damage, each in units of what the targets allow.
_WEIGHTS = (0.1, 0.3, 1.0)
_STEP = 0.6
_COMPARED = (0.6, 0.5, 0.45, 0.4, 0.3)
_UNIFORM = (0.9, 0.8, 0.7, 0.5)
_OTHERS, _OTHER_RATIOS = ("random", "recent-window", "keydiff"), (0.7, 0.5)


@dataclass(frozen=True)
class Targets:
    """The loss that a plan may cause.

    Args:
        ppl: rise of perplexity in % (> 0).
        passkey: share (in (0, 1]) of the passkeys that must still be found; None to ignore passkeys.

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
        """The allowed rise of perplexity, in nats per token."""
        return math.log1p(self.ppl / 100)

    @property
    def key_nats(self) -> float:
        """The allowed rise of a key's negative log-likelihood: its probability may fall to the share ``passkey``."""
        return -math.log(min(self.passkey or 1.0, 0.99))

    def met(self, damage: Damage, *, text: bool, keys: bool) -> bool:
        """Whether ``damage`` is within the targets for ``text`` and for ``keys``, as far as these are true."""
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
    """Search, then measure on unseen documents and passkeys; the best plan so far is always at ``path``.

    The search stores its measurements in a file beside ``path``: after a stop, the same call continues.

    Args:
        bench: the model and the text.
        targets: the loss that a plan may cause.
        path: the plan file.
        context: tokens (>= the policy's prune_after) before the scored tokens.
        minutes: time for the search (> 0); the measurement at the end takes extra time.
        fresh: ignore earlier measurements.
        progress: gets every step.

    Raises:
        KnormError: ``minutes`` is not above 0, nothing can be written at ``path``, the text is too short, the context
            is too short to be pruned, the model has layers without full attention or too few positions for passkeys,
            or no plan is within the targets. Then an earlier file at ``path`` is unchanged.
    """
    progress = progress or Progress()
    base = KnormPress(layer_keep_ratios=(1.0,) * bench.layers, keep_recent=_RECENT)
    if not minutes > 0:
        raise KnormError(f"minutes is {minutes}; wanted a time above 0, such as 5")
    if not path.name or path.is_dir():
        raise KnormError(f"the plan can't be written to {path}, which is a folder; name a file, such as plan.json")
    if context < base.prune_after:
        raise KnormError(f"a context of {context} tokens is too short to be pruned; wanted at least {base.prune_after}")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=bench.model.config).layers):
        raise KnormError(
            f"{bench.model_info.name} has layers without full attention, so no plan can be tuned; use another model"
        )
    seen, unseen = _split(bench, context)
    prompts: list[Haystack] = []
    asked: list[Haystack] = []
    if targets.passkey is not None:
        prompts = haystacks(bench, ("passkey",), count=CALIBRATION_PASSKEYS, which="calibration")
        asked = haystacks(bench, ("passkey",), count=HELD_OUT_PASSKEYS, which="held-out")
    fingerprint = model_fingerprint(bench.model)
    identity = {
        "model": fingerprint,
        "tokens": _hash_of([*seen, *(part for prompt in prompts for part in _tokens_of(prompt))]),
        "context": context,
        "knormpress": __version__,
    }
    notes = Notes(path.with_name(f"{path.name}.search.jsonl"), identity, fresh=fresh)
    if notes.goes_on:
        progress.say(f"continuing with the earlier measurements in {notes.path}; to start over, use --fresh")
    plan = Plan(
        press=base,
        model=PlannedModel(name=bench.model_info.name, dtype=bench.model_info.dtype, fingerprint=fingerprint),
        targets=PlannedTargets(ppl=targets.ppl, passkey=targets.passkey),
        calibration=_text_of(bench, context, CALIBRATION_SCORED, _SEEN, len(prompts)),
        held_out=_text_of(bench, context, SCORED, _UNSEEN, len(asked)),
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
    passkeys = asked if search.with_keys else []
    frontier = measure_unseen(bench, tried, unseen, context=context, passkeys=passkeys, progress=progress)
    kept = kept_tokens(bench, search.press, unseen[0][:, :context])
    plan = plan.model_copy(update={"frontier": frontier, "kept": kept})
    write_plan(plan, path)
    return plan


class _Search:
    """A running search. ``plan`` is the best so far; ``alone`` has the best policy for each target alone."""

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
            progress.say("the full cache finds no passkey, so none can be lost: only perplexity counts")

    @property
    def press(self) -> KnormPress:
        """The policy of the best plan so far."""
        return KnormPress.of(self.plan.press)

    def run(self) -> None:
        """Find the plans; raises if none is within the targets."""
        finished_round = False
        with suppress(_TimeIsUp):
            self._measure_layers()
            for weight in _WEIGHTS if self.with_keys else (0.0,):
                self._find(weight, self.press)
            if self.with_keys:
                for name, weight in (("perplexity", 0.0), ("passkeys", math.inf)):
                    self._find(weight, self.press, alone=name)
            for recent in _OTHER_RECENT:
                self._find(self.weight, replace(self.press, keep_recent=recent))
            finished_round = True
            while self._refine():
                pass
        if self.plan.mean_keep == 1.0:
            raise KnormError(
                "no plan within the targets was found"
                + (" in the time" if time.perf_counter() > self.end else "")
                + "; use a larger --target-ppl, a smaller --target-passkey, or more --minutes"
            )
        if not finished_round:
            self.progress.say(
                "the time ran out before every step was done once; run again to continue, or use more --minutes"
            )

    def curves(self, weight: float) -> list[Curve]:
        """Each layer's damage: the text's plus ``weight`` times the passkeys', in units of what the targets allow."""
        text_weight, key_weight = (0.0, 1.0) if weight == math.inf else (1.0, weight)
        text_weight, key_weight = text_weight / self.targets.text_nats, key_weight / self.targets.key_nats
        sums = []
        for text, keys in zip(self.text, self.keys, strict=True):
            damages = zip(text.damage, keys.damage, strict=True)
            sums.append(Curve(text.ratios, tuple(text_weight * t + key_weight * k for t, k in damages)))
        return sums

    def _measure(self, press: KnormPress, measure: Callable[[], Damage]) -> Damage:
        damage = self.notes.get(press)
        if damage is None:
            if time.perf_counter() > self.end:
                raise _TimeIsUp
            damage = measure()
            self.notes.note(press, damage)
        return damage

    def _measure_layers(self) -> None:
        base = self.press
        layers = self.bench.layers
        tick = ticking(self.progress, layers * len(_RATIOS), "each layer alone")
        damages = self._around(base, [(layer, ratio) for ratio in _RATIOS for layer in range(layers)], tick)
        ratios = (*_RATIOS, 1.0)
        rows = [[damages[layer, ratio] for ratio in _RATIOS] for layer in range(layers)]
        text = [tuple(d.text for d in row) for row in rows]
        keys = [tuple(max(d.key_nll, 0.0) for d in row) for row in rows]
        self.text = [Curve(ratios, (*damage, 0.0)) for damage in text]
        self.keys = [Curve(ratios, (*damage, 0.0)) for damage in keys]
        sensitivities = Sensitivities(ratios=_RATIOS, text=tuple(text), passkey=tuple(keys))
        self.plan = self.plan.model_copy(update={"sensitivities": sensitivities})

    def _around(
        self, base: KnormPress, changes: Sequence[tuple[int, float]], tick: Callable[[], None]
    ) -> dict[tuple[int, float], Damage]:
        """The damage of ``base`` with one layer's ratio changed, for each (layer, ratio)."""
        damages = {}
        measure: Callable[[KnormPress, int], Damage] | None = None
        for layer, ratio in changes:
            ratios = list(base.layer_keep_ratios or ())
            ratios[layer] = ratio
            press = replace(base, layer_keep_ratios=tuple(ratios))
            if measure is None and self.notes.get(press) is None:
                measure = self.probes.around(base)
            damages[layer, ratio] = self._measure(press, partial(measure, press, layer) if measure else _unreachable)
            tick()
        return damages

    def _find(self, weight: float, press: KnormPress, alone: str = "") -> None:
        """Try plans with fewer and fewer tokens; replace the best one so far, for all targets or for one ``alone``."""
        best = self.alone.get(alone, None) if alone else self.press
        high = 0.9 if best is None else min(0.9, best.mean_keep - 0.01)
        doing = f"plans within {alone or 'the targets'}"
        self.progress.step(0, 1, doing)

        def is_good(ratios: tuple[float, ...]) -> bool:
            candidate = replace(press, layer_keep_ratios=ratios)
            damage = self._measure(candidate, lambda: self.probes.measure(candidate))
            return self.targets.met(damage, text=alone != "passkeys", keys=alone != "perplexity")

        low = max(_RATIOS[0], high - 0.2) if high < 0.9 else _RATIOS[0]
        ratios = least_keep(self.curves(weight), is_good, low=low, high=high)
        if ratios is None:
            return
        best = replace(press, layer_keep_ratios=ratios)
        if alone:
            self.alone[alone] = best
        else:
            self.weight = weight
            self.plan = self.plan.model_copy(update={"press": best})
            write_plan(self.plan, self.path)

    def _refine(self) -> bool:
        """Measure the layers around the best plan, and search near it for a better plan; true if there is one."""
        base = self.press
        ratios = base.layer_keep_ratios or ()
        moves = []
        for layer, ratio in enumerate(ratios):
            for moved in (max(_RATIOS[0], round(ratio * _STEP, 3)), min(1.0, round(ratio / _STEP, 3))):
                if moved != ratio:
                    moves.append((layer, moved))
        now = self._measure(base, lambda: self.probes.measure(base))
        moved_damages = self._around(base, moves, ticking(self.progress, len(moves), "the layers around the best plan"))
        text, keys = [], []
        for layer, ratio in enumerate(ratios):
            damages = {moved: moved_damages[layer, moved] for owner, moved in moves if owner == layer} | {ratio: now}
            sampled = tuple(sorted(damages))
            text.append(Curve(sampled, tuple(damages[each].text - now.text for each in sampled)))
            keys.append(Curve(sampled, tuple(damages[each].key_nll - now.key_nll for each in sampled)))
        before, self.text, self.keys = (self.text, self.keys), text, keys
        try:
            self._find(self.weight, base)
        finally:
            self.text, self.keys = before
        return self.press != base


def _compared(search: _Search) -> list[Tried]:
    """The plan, the plans for each target alone, other sizes from the same curves, and other methods."""
    press, curves = search.press, search.curves(search.weight)
    tuned = [Tried("tuned", press)]
    tuned += [Tried(f"tuned for {name}", alone) for name, alone in search.alone.items()]
    tuned += [Tried("tuned", replace(press, layer_keep_ratios=plan_at(curves, keep))) for keep in _COMPARED]
    uniform = [Tried("uniform", KnormPress(keep)) for keep in _UNIFORM]
    others = [Tried(name, KnormPress(keep), name, passkeys=keep < 0.7) for name in _OTHERS for keep in _OTHER_RATIOS]
    return [*tuned, *uniform, *others]


def _split(bench: Bench, context: int) -> tuple[list[Tensor], list[Tensor]]:
    """Documents for calibration, and other documents for the final measurement, both spread over the text."""
    texts = bench.documents(length=context + SCORED + 1, count=_CUT)
    short = context + CALIBRATION_SCORED + 1
    return [texts[i][:, :short] for i in _SEEN], [texts[i] for i in _UNSEEN]


def _tokens_of(prompt: Haystack) -> list[Tensor]:
    return [prompt.ids, *(part for question in prompt.questions for part in (question.ids, question.answer))]


def _hash_of(texts: Sequence[Tensor]) -> str:
    """SHA-256 of token ids, which differs for another text or another tokenizer."""
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
    raise AssertionError("a stored damage is not measured again")
