"""Search for the plan that keeps the fewest tokens within the user's targets, and measure it on unseen text.

First each layer is pruned alone, by each score, and the damage is measured. The damages nearly add up, so the best plan
of any size can be computed from them (``allocation``). Then whole plans are tried. In the remaining time the layers are
measured again, around the best plan. The result is measured on other documents and items than those of the search.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from transformers.cache_utils import DynamicCache, DynamicLayer

from knormpress import __version__
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.cache.scores.named import score_named
from knormpress.errors import KnormError
from knormpress.methods.knorm import KnormPress
from knormpress.progress import Progress, ticking
from knormpress.records.plan import Plan, PlannedModel, PlannedTargets, Sensitivities, write_plan
from knormpress.tune.allocation import Choice, Curve, least_keep, mean_of, plan_at
from knormpress.tune.notes import Damage, Notes
from knormpress.tune.place import Here, Meter, Place
from knormpress.tune.texts import split
from knormpress.tune.unseen import Tried
from knormpress.tune.work import Work
from knormpress.workload.bench import Bench

__all__ = ["Targets", "tune"]

SCORES = ("knorm", "keydiff", "keydiff-128", "leverage")
"""The scores that a layer may get unless others are named."""

# Each layer alone is pruned to this ratio. A lower one would leave little more than the newest tokens of a short text;
# what lies between it and 1, whole plans tell better in the same time.
_LOWEST = 0.1
# So many scores of each layer, the best of it alone, are tried in plans.
_BEST = 2
_RECENT, _OTHER_RECENT = 32, (16, 64)
# Weights of the items' damage relative to text damage, each in units of what the targets allow.
_WEIGHTS = (0.1, 0.3, 1.0)
_STEP = 0.6
# Measuring layers serves whole plans: so many are tried whatever the time.
_LEAST_PLANS = 4
_COMPARED = (0.4, 0.3, 0.2)
_UNIFORM = (0.9, 0.7, 0.5)
_OTHERS, _OTHER_RATIOS = ("random", "recent-window", "keydiff"), (0.5,)
_MOST_COMPARED = 1 + len(_COMPARED) + len(_UNIFORM) + len(_OTHERS) * len(_OTHER_RATIOS)


@dataclass(frozen=True)
class Targets:
    """The loss that a plan may cause.

    Args:
        ppl: rise of perplexity in % (> 0).
        retrieval: share (in (0, 1]) of the full cache's items that must still be found; None to ask for none.

    Raises:
        KnormError: a value is out of its range.
    """

    ppl: float = 5.0
    retrieval: float | None = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.ppl < math.inf:
            raise KnormError(f"target_ppl is {self.ppl}; wanted a rise of perplexity in %, such as 5")
        if self.retrieval is not None and not 0 < self.retrieval <= 1:
            raise KnormError(f"target_retrieval is {self.retrieval}; wanted a share above 0 and at most 1, or none")

    @property
    def text_nats(self) -> float:
        """The allowed rise of perplexity, in nats per token."""
        return math.log1p(self.ppl / 100)

    @property
    def answer_nats(self) -> float:
        """The unit of the rise of an answer's negative log-likelihood: its probability falls to the share wanted."""
        return -math.log(min(self.retrieval or 1.0, 0.99))

    def met(self, damage: Damage) -> bool:
        """Whether ``damage`` is within the targets."""
        # On few documents a low rise can be luck; the divergence has less noise and is about as large.
        within = all(rise <= self.text_nats for rise in (damage.nll, damage.text))  # NaN is not
        return within and (self.retrieval is None or damage.found >= self.retrieval)


class _TimeIsUp(Exception):
    pass


def tune(
    bench: Bench,
    targets: Targets,
    path: Path,
    *,
    scores: Sequence[str] = SCORES,
    context: int = 1_024,
    minutes: float = 8.0,
    fresh: bool = False,
    place: Place | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Search, then measure on unseen documents and items; the best plan so far is always at ``path``.

    The search stores its measurements in a file beside ``path``: after a stop, the same call continues.

    Args:
        bench: the model and the text.
        targets: the loss that a plan may cause.
        path: the plan file.
        scores: names of the scores that a layer may get, see ``cache.scores.named``; the first is what is compared.
        context: tokens (>= the policy's prune_after) before the scored tokens.
        minutes: time for the search and the measurement at the end (> 0). The search gets at least half of it, and
            measures four whole plans in any case.
        fresh: ignore earlier measurements.
        place: where to measure; in this process, with the model of ``bench``, unless given.
        progress: gets every step.

    Raises:
        KnormError: there is no such score, ``minutes`` is not above 0, nothing can be written at ``path``, the text is
            too short, the context is too short to be pruned, the model has layers without full attention or too few
            positions for the items, or no plan is within the targets. Then an earlier file at ``path`` is unchanged.
    """
    place, progress = place or Here(bench), progress or Progress()
    base = KnormPress(layer_keep_ratios=(1.0,) * bench.layers, keep_recent=_RECENT)
    scores = tuple(dict.fromkeys(scores))
    if not scores:
        raise KnormError("scores is empty; wanted at least one, such as knorm")
    for name in scores:
        score_named(name)
    if not minutes > 0:
        raise KnormError(f"minutes is {minutes}; wanted a time above 0, such as 8")
    if not path.name or path.is_dir():
        raise KnormError(f"the plan can't be written to {path}, which is a folder; name a file, such as plan.json")
    if context < base.prune_after:
        raise KnormError(f"a context of {context} tokens is too short to be pruned; wanted at least {base.prune_after}")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=bench.model.config).layers):
        raise KnormError(
            f"{bench.model_info.name} has layers without full attention, so no plan can be tuned; use another model"
        )
    calibration, held_out = split(bench, context=context, with_items=targets.retrieval is not None)
    place.load()
    began = time.perf_counter()
    fingerprint = model_fingerprint(bench.model)
    identity = {
        "model": fingerprint,
        "tokens": calibration.sha256,
        "context": context,
        "knormpress": __version__,
    }
    notes = Notes(path.with_name(f"{path.name}.search.jsonl"), identity, fresh=fresh)
    if notes.goes_on:
        progress.say(f"continuing with the earlier measurements in {notes.path}; to start over, use --fresh")
    plan = Plan(
        press=base,
        model=PlannedModel(name=bench.model_info.name, dtype=bench.model_info.dtype, fingerprint=fingerprint),
        targets=PlannedTargets(ppl=targets.ppl, retrieval=targets.retrieval),
        calibration=calibration.described(bench),
        held_out=held_out.described(bench),
        made={"tuned": datetime.now(timezone.utc).isoformat(timespec="seconds"), "knormpress": __version__},
    )
    work = Work.of(calibration, held_out, alone=_alone(bench.layers, len(scores)), policies=_MOST_COMPARED)
    progress.say(str(work))
    with place.probes(calibration, progress) as probes:
        read = time.perf_counter() - began
        search = _Search(
            layers=bench.layers,
            probes=probes,
            notes=notes,
            targets=targets,
            plan=plan,
            path=path,
            progress=progress,
            scores=scores,
            end=work.end_of_search(began, 60 * minutes, read),
            # Without all layers there is no plan: they may take the report's time.
            layers_end=began + 60 * minutes,
        )
        search.run()
    plan = search.plan
    unseen = held_out if search.with_items else replace(held_out, asked=())
    frontier = place.report(_compared(search), unseen, progress)
    kept = place.kept_tokens(search.press, held_out.documents[0][:, :context])
    plan = plan.model_copy(update={"frontier": frontier, "kept": kept})
    write_plan(plan, path)
    return plan


class _Search:
    """A running search. ``plan`` is the best so far."""

    def __init__(
        self,
        *,
        layers: int,
        probes: Meter,
        notes: Notes,
        targets: Targets,
        plan: Plan,
        path: Path,
        progress: Progress,
        scores: Sequence[str],
        end: float,
        layers_end: float,
    ) -> None:
        self.layers, self.probes, self.notes, self.targets = layers, probes, notes, targets
        self.plan, self.path, self.progress, self.scores = plan, path, progress, scores
        # For each layer the damage of the text and of the items, a curve for each of its scores.
        self.text: list[dict[str, Curve]] = []
        self.answers: list[dict[str, Curve]] = []
        self.weight = 0.0
        self.end, self.layers_end = end, layers_end
        self.plans = 0
        self.with_items = probes.items > 0
        if targets.retrieval is not None and not self.with_items:
            progress.say("the full cache finds no item, so none can be lost: only perplexity counts")

    @property
    def press(self) -> KnormPress:
        """The policy of the best plan so far."""
        return KnormPress.of(self.plan.press)

    def run(self) -> None:
        """Find the plan; raises if none is within the targets."""
        finished_round = False
        with suppress(_TimeIsUp):
            self._measure_layers()
            for weight in _WEIGHTS if self.with_items else (0.0,):
                self._find(weight, self.press)
            for recent in _OTHER_RECENT:
                self._find(self.weight, replace(self.press, keep_recent=recent))
            finished_round = True
            while self._refine():
                pass
        if self.plan.mean_keep == 1.0:
            raise KnormError(
                "no plan within the targets was found"
                + (" in the time" if time.perf_counter() > self.end else "")
                + "; use a larger --target-ppl, a smaller --target-retrieval, or more --minutes"
            )
        if not finished_round:
            self.progress.say(
                "the time ran out before every step was done once; run again to continue, or use more --minutes"
            )

    def planned(self, press: KnormPress, weight: float, mean_keep: float) -> KnormPress:
        """The best plan of the size ``mean_keep`` by the damages of single layers; the rest is as in ``press``."""
        return self._press(press, plan_at(self._curves(weight), mean_keep))

    def _curves(self, weight: float) -> list[list[Curve]]:
        """Each layer's damages: the text's plus ``weight`` times the items', in units of what the targets allow."""
        text_weight, answer_weight = 1 / self.targets.text_nats, weight / self.targets.answer_nats
        layers = []
        for text, answers in zip(self.text, self.answers, strict=True):
            curves = []
            for name, curve in text.items():
                damages = zip(curve.damage, answers[name].damage, strict=True)
                curves.append(Curve(curve.ratios, tuple(text_weight * t + answer_weight * a for t, a in damages)))
            layers.append(curves)
        return layers

    def _press(self, press: KnormPress, choices: Sequence[Choice]) -> KnormPress:
        names = [list(curves)[choice.curve] for curves, choice in zip(self.text, choices, strict=True)]
        # A layer that keeps everything has no use for a score, and two names of one plan would be measured twice.
        names = [self.scores[0] if choice.ratio == 1.0 else name for name, choice in zip(names, choices, strict=True)]
        ratios = tuple(choice.ratio for choice in choices)
        return replace(press, layer_keep_ratios=ratios, layer_scores=_told(names))

    def _measure(self, press: KnormPress) -> Damage:
        """The damage of a whole plan, on all texts."""
        damage = self.notes.get(press, few=False)
        if damage is None:
            if self.plans >= _LEAST_PLANS:
                self._expect_time(self.end)
            self.plans += 1
            damage = self.probes.measure(press)
            self.notes.note(press, damage, few=False)
        return damage

    def _expect_time(self, end: float) -> None:
        if time.perf_counter() > end:
            raise _TimeIsUp

    def _measure_layers(self) -> None:
        """Measure each layer alone by every score."""
        layers = range(self.layers)
        most = min(_BEST, len(self.scores))
        tick = ticking(self.progress, _alone(len(layers), len(self.scores)), "each layer alone")
        moves = [_Move(layer, _LOWEST, score) for score in self.scores for layer in layers]
        damages = self._around(self.press, moves, tick, end=self.layers_end)

        def cost(move: _Move) -> float:
            damage = damages[move]
            return damage.text / self.targets.text_nats + _WEIGHTS[1] * damage.answer_nll / self.targets.answer_nats

        ratios = (_LOWEST, 1.0)
        for layer in layers:
            best = sorted((_Move(layer, _LOWEST, score) for score in self.scores), key=cost)[:most]
            found = {move.score: damages[move] for move in best}
            self.text.append({name: Curve(ratios, (damage.text, 0.0)) for name, damage in found.items()})
            self.answers.append(
                {name: Curve(ratios, (max(damage.answer_nll, 0.0), 0.0)) for name, damage in found.items()}
            )
        shown = [next(iter(curves.values())).damage[:-1] for curves in self.text]
        answers = [next(iter(curves.values())).damage[:-1] for curves in self.answers]
        sensitivities = Sensitivities(ratios=(_LOWEST,), text=tuple(shown), answers=tuple(answers))
        self.plan = self.plan.model_copy(update={"sensitivities": sensitivities})

    def _around(
        self, base: KnormPress, moves: Sequence[_Move], tick: Callable[[], None], *, end: float
    ) -> dict[_Move, Damage]:
        """The damage of ``base`` with one layer changed, for each move."""
        presses = {move: move.of(base) for move in moves}
        found: dict[KnormPress, Damage] = {}
        missing: dict[KnormPress, int] = {}
        for move, press in presses.items():
            damage = self.notes.get(press, few=True)
            if damage is None:
                missing[press] = move.layer
            else:
                found[press] = damage
                tick()
        measured = self.probes.around(base, missing)
        for _ in missing:
            self._expect_time(end)
            press, damage = next(measured)
            self.notes.note(press, damage, few=True)
            found[press] = damage
            tick()
        return {move: found[press] for move, press in presses.items()}

    def _find(self, weight: float, press: KnormPress) -> None:
        """Try plans with fewer and fewer tokens; replace the best one so far."""
        high = min(0.9, self.plan.mean_keep - 0.01)
        self.progress.step(0, 1, "plans within the targets")
        good: list[tuple[Choice, ...]] = []

        def is_good(choices: tuple[Choice, ...]) -> bool:
            if is_met := self.targets.met(self._measure(self._press(press, choices))):
                good.append(choices)
            return is_met

        low = max(_LOWEST, high - 0.2) if high < 0.9 else _LOWEST
        try:
            least_keep(self._curves(weight), is_good, low=low, high=high)
        finally:
            # Also where the time runs out between two halvings.
            if good:
                self._take(weight, press, good[-1])

    def _take(self, weight: float, press: KnormPress, choices: Sequence[Choice]) -> None:
        """Make a plan within the targets the best one, and write it, if it is smaller than the best so far."""
        # Where every layer is at its lowest ratio, only scores can change, and would change back and forth.
        if mean_of(choices) >= self.plan.mean_keep:
            return
        self.weight = weight
        self.plan = self.plan.model_copy(update={"press": self._press(press, choices)})
        write_plan(self.plan, self.path)

    def _refine(self) -> bool:
        """Measure the layers around the best plan, and search near it for a better plan; true if there is one."""
        base = self.press
        now, moves = [], []
        planned = zip(base.ratios(self.layers), base.scores(self.layers), self.text, strict=True)
        for layer, (ratio, score, curves) in enumerate(planned):
            now.append(_Move(layer, ratio, next(iter(curves)) if ratio == 1.0 else score))
            near = {max(_LOWEST, round(ratio * _STEP, 3)), min(1.0, round(ratio / _STEP, 3))} - {ratio}
            moves += [now[-1]._replace(ratio=moved) for moved in sorted(near)]
            if ratio < 1.0:
                moves += [now[-1]._replace(score=other) for other in curves if other != score]
        tick = ticking(self.progress, len(moves) + 1, "the layers around the best plan")
        damages = self._around(base, [now[0], *moves], tick, end=self.end)
        unmoved = damages[now[0]]
        text: list[dict[str, Curve]] = [{} for _ in now]
        answers: list[dict[str, Curve]] = [{} for _ in now]
        for stay in now:
            own = [stay, *(move for move in moves if move.layer == stay.layer)]
            for score in dict.fromkeys(move.score for move in own):
                sampled = sorted((move for move in own if move.score == score), key=lambda move: move.ratio)
                found = [unmoved if move == stay else damages[move] for move in sampled]
                ratios = tuple(move.ratio for move in sampled)
                text[stay.layer][score] = Curve(ratios, tuple(damage.text - unmoved.text for damage in found))
                answers[stay.layer][score] = Curve(
                    ratios, tuple(damage.answer_nll - unmoved.answer_nll for damage in found)
                )
        before, self.text, self.answers = (self.text, self.answers), text, answers
        try:
            self._find(self.weight, base)
        finally:
            self.text, self.answers = before
        return self.press != base


class _Move(NamedTuple):
    """One layer's ratio and score, in place of those of a plan."""

    layer: int
    ratio: float
    score: str

    def of(self, base: KnormPress) -> KnormPress:
        """``base`` with this layer changed."""
        layers = len(base.layer_keep_ratios or ())
        ratios, scores = list(base.ratios(layers)), list(base.scores(layers))
        ratios[self.layer], scores[self.layer] = self.ratio, self.score
        return replace(base, layer_keep_ratios=tuple(ratios), layer_scores=_told(scores))


def _alone(layers: int, scores: int) -> int:
    """How often layers alone are measured before whole plans are tried."""
    return layers * scores


def _told(scores: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the layers' scores; None if all are key norms."""
    return None if set(scores) == {"knorm"} else tuple(scores)


def _compared(search: _Search) -> list[Tried]:
    """The plan, other sizes from the same curves, and other methods."""
    press = search.press
    sizes = [search.planned(press, search.weight, keep) for keep in _COMPARED]
    others_of_its_kind = [Tried("tuned", size) for size in sizes if size != press]
    uniform = [Tried("uniform", KnormPress(keep)) for keep in _UNIFORM]
    others = [Tried(name, KnormPress(keep), name) for name in _OTHERS for keep in _OTHER_RATIOS]
    return [Tried("tuned", press), *others_of_its_kind, *uniform, *others]
