"""Synthetic records for tests. Nothing in here was measured: every figure is drawn from the parameters given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from knormpress.records.figures import Cost, Counts, DocumentScore, Latency, Memory, Quality, Reading, Run
from knormpress.records.retrieval import Answer, Item, Retrieval
from knormpress.records.schema import Conditions, Environment, MethodInfo, ModelInfo, Record, TextInfo

__all__ = ["make_planned", "make_record", "make_records", "make_retrieval", "without_more"]

# Changes in % at a few keep ratios, of the size that a small model shows on a CPU; between them they are interpolated.
_RATIOS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
_TTFT = (1.5, 1.0, 0.5, 0.3, 0.0, -0.5, -1.0, -2.0)
_TPOT = (-52.0, -48.0, -40.0, -33.0, -25.0, -20.0, -15.0, -10.0)
_PPL = (600.0, 310.0, 48.0, 16.6, 6.7, 3.5, 1.4, 0.0)


def make_record(
    keep_ratio: float = 0.7,
    *,
    ttft: float | None = None,
    tpot: float | None = None,
    ppl: float | None = None,
    rounds: int = 8,
    documents: int = 8,
    scored: int = 256,
    noise: float = 0.02,
    drift: float = 0.0,
    prompt_tokens: int = 1024,
    new_tokens: int = 64,
    prefill_chunk: int | None = None,
    candidate_chunk: int | None = None,
    reused_tokens: int | None = None,
    ttft_cold_s: float | None = None,
    weights_tpot_s: float | None = None,
    method: str = "knorm",
    plan: tuple[float, ...] | None = None,
    found: float | None = None,
    seed: int = 0,
    **names: Any,
) -> Record:
    """A whole record in which the changes in % are as asked for.

    ``noise`` is the relative standard deviation of each time, ``drift`` the slowdown of the machine from the first pair
    of runs to the last. The PPL change is met exactly. ``found`` is the share of retrieval items
    that are found; None if nothing was asked. ``names`` replaces fields of environment, model and text, such
    as ``device="cuda"``, ``model_name="other"`` or ``text_name="prose"``.
    """
    random = np.random.default_rng([seed, round(keep_ratio * 1000), prompt_tokens])
    ttft = float(np.interp(keep_ratio, _RATIOS, _TTFT)) if ttft is None else ttft
    tpot = float(np.interp(keep_ratio, _RATIOS, _TPOT)) if tpot is None else tpot
    ppl = float(np.interp(keep_ratio, _RATIOS, _PPL)) if ppl is None else ppl

    def run(round_: int, ttft_ratio: float, tpot_ratio: float) -> Run:
        slow = 1.0 + drift * round_ / max(rounds - 1, 1)
        jitter = np.exp(random.normal(0.0, noise, new_tokens)) * slow
        first = 0.4e-3 * prompt_tokens * ttft_ratio * jitter[0]
        return Run(ttft_s=float(first), gaps_s=tuple((0.02 * tpot_ratio * jitter[1:]).tolist()))

    cache_bytes = prompt_tokens * 46_080
    device = names.get("device", "cpu")
    return Record(
        created=names.get("created", "2026-03-14T09:26:53+00:00"),
        environment=Environment(
            knormpress="0.1.0",
            python="3.11.7",
            torch="2.9.0",
            transformers="5.1.0",
            platform="Linux-6.1-x86_64",
            processor="x86_64",
            device=device,
            device_name=names.get("device_name", "Synthetic CPU @ 2.50 GHz"),
            device_map=names.get("device_map"),
            threads=names.get("threads", 2),
            git_commit="0" * 40,
            git_dirty=False,
        ),
        model=ModelInfo(
            name=names.get("model_name", "SmolLM2-135M-Instruct"),
            source="synthetic",
            fingerprint=names.get("fingerprint", "f" * 64),
            dtype=names.get("dtype", "float32"),
            parameters=134_515_008,
        ),
        text=TextInfo(name=names.get("text_name", "WikiText-2 test"), source="synthetic", sha256="a" * 64),
        policy=MethodInfo(
            method=method,
            keep_ratio=keep_ratio,
            prune_after=512,
            skip_layers=(0,),
            layer_keep_ratios=plan,
            keep_recent=0,
            prune_interval=64,
            schedule="proportional",
        ),
        conditions=Conditions(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            prefill_chunk=prefill_chunk,
            rounds=rounds,
            samples=documents,
            context_tokens=prompt_tokens,
            scored_tokens=scored,
            candidate_chunk=candidate_chunk,
            reused_tokens=reused_tokens,
        ),
        latency=Latency(
            baseline=tuple(run(round_, 1.0, 1.0) for round_ in range(rounds)),
            candidate=tuple(run(round_, 1.0 + ttft / 100, 1.0 + tpot / 100) for round_ in range(rounds)),
            stopped="rounds",
            calibration_s=(0.01, 0.01),
            ttft_cold_s=ttft_cold_s,
            weights_tpot_s=weights_tpot_s,
        ),
        memory=Memory(
            baseline_cache_bytes=cache_bytes,
            candidate_cache_bytes=math.ceil(cache_bytes * (1 + 29 * keep_ratio) / 30),
            baseline_device=(Reading(name="peak RSS", bytes=900_000_000),),
            candidate_device=(Reading(name="peak RSS", bytes=None, reason="not lower than an earlier peak"),),
            decoded_tokens=new_tokens,
            baseline_decoded_bytes=cache_bytes * 103 // 100,
            candidate_decoded_bytes=math.ceil(cache_bytes * (1 + 29 * keep_ratio) / 30) * 103 // 100,
        ),
        quality=_quality(np.random.default_rng(seed), documents, scored, ppl, keep_ratio),
        retrieval=None if found is None else make_retrieval(found, seed=seed),
        cost=_cost(keep_ratio, prompt_tokens),
    )


def _cost(keep_ratio: float, prompt_tokens: int) -> Cost:
    def counts(*, tokens: int, stored: float, reads: int) -> Counts:
        moved = int(tokens * 500_000_000 + stored * 46_080)
        return Counts(
            ops=2_100 * tokens + 60 * (reads - tokens),
            moved=moved,
            flops=270_000_000 * tokens,
            allocated=moved // 10,
            host_reads=reads,
            attention=30 * tokens,
        )

    reads = 0 if keep_ratio == 1.0 else 87
    return Cost(
        baseline_prefill=counts(tokens=1, stored=prompt_tokens, reads=1),
        candidate_prefill=counts(tokens=1, stored=prompt_tokens, reads=1 + reads),
        baseline_decode=counts(tokens=16, stored=16 * prompt_tokens, reads=16),
        candidate_decode=counts(tokens=16, stored=16 * prompt_tokens * keep_ratio, reads=16 + reads),
        tokens_before=0,
        tokens=16,
    )


def make_retrieval(
    found: float, *, texts: int = 6, tasks: tuple[str, ...] = ("multikey-prose", "list"), seed: int = 0
) -> Retrieval:
    """Four items for each text of each task, all solved by the full cache, of which about the share ``found`` is."""
    random = np.random.default_rng(seed)
    kept = iter(random.permutation(np.arange(4 * texts * len(tasks)) < round(4 * texts * len(tasks) * found)))
    items = []
    for task in tasks:
        for text in range(texts):
            for question in range(4):
                is_found = bool(next(kept))
                full = Answer(nll=0.5, found=True, chosen=True)
                candidate = Answer(nll=0.6 if is_found else 8.0, found=is_found, chosen=is_found)
                depth, length = 0.05 + question / 4.2, (660, 860, 1060, 1300)[text % 4]
                place = {"task": task, "text": text, "name": f"key {question}", "length": length, "depth": depth}
                items.append(Item(**place, tokens=6, full=full, candidate=candidate))
    return Retrieval(asked=dict.fromkeys(tasks, 4 * texts + 2), items=tuple(items))


def without_more(record: Record, *names: str) -> Record:
    """``record`` without the figures called ``names`` of each token, as earlier versions stored it."""
    documents = tuple(one.model_copy(update=dict.fromkeys(names, ())) for one in record.quality.documents)
    return record.model_copy(update={"quality": Quality(documents=documents)})


def make_planned(**parameters: Any) -> list[Record]:
    """A plan whose prompt comes whole, in chunks, and behind a saved context, with the TTFT that each may have."""
    plan = {"plan": (0.9, 0.1, 0.2), "prompt_tokens": 4096, **parameters}
    chunked, reused = {"candidate_chunk": 1024, "ttft": -30.0}, {"reused_tokens": 4064, "ttft": -88.0}
    return [make_record(**{**plan, **way}) for way in ({}, chunked, reused)]


def make_records(keep_ratios: Iterable[float], **parameters: Any) -> list[Record]:
    """One record for each keep ratio, all else alike."""
    return [make_record(keep_ratio, **parameters) for keep_ratio in keep_ratios]


def _quality(random: np.random.Generator, documents: int, scored: int, ppl: float, keep_ratio: float) -> Quality:
    before = random.gamma(1.5, 1.8, (documents, scored))
    shift = math.log1p(ppl / 100)
    size = abs(shift)
    spread = random.normal(0.0, 0.1 + size, (documents, scored)) + random.normal(0.0, 0.2 * size, (documents, 1))
    gap = np.zeros_like(spread) if ppl == 0 else spread - spread.mean() + shift
    kl = 0.0 if keep_ratio == 1.0 else 0.3 * size + 0.002
    # Most tokens hardly differ, some by much; their mean is `kl`.
    divergence = random.gamma(0.5, 1.0, (documents, scored))
    divergence *= kl / divergence.mean(axis=1, keepdims=True)
    # About one token in sixteen needs what is far away.
    local = before + np.where(random.random((documents, scored)) < 1 / 16, 3.0, 0.1)
    return Quality(
        documents=tuple(
            DocumentScore(
                document=number,
                baseline_nll=tuple(before[number].tolist()),
                candidate_nll=tuple((before[number] + gap[number]).tolist()),
                kl=kl,
                top1_agreement=1.0 if keep_ratio == 1.0 else 1.0 - 0.4 * (1 - keep_ratio) ** 1.2,
                token_kl=tuple(divergence[number].tolist()),
                local_nll=tuple(local[number].tolist()),
                decoded_nll=tuple((before[number] + 1.2 * gap[number]).tolist()),
            )
            for number in range(documents)
        )
    )
