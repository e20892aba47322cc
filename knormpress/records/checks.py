"""Check that a record is usable: complete pairs, times above 0, finite scores."""

from __future__ import annotations

import math

from knormpress.errors import KnormError
from knormpress.records.schema import Record
from knormpress.stats.perplexity import LARGEST_NATS

__all__ = ["sound"]


def sound(record: Record) -> Record:
    """Return ``record``, if every figure derived from it can be computed.

    Raises:
        KnormError: the record has unequal numbers of runs or tokens, a time that is not positive, a full cache without
            bytes, or a score that is not finite.
    """
    latency, memory = record.latency, record.memory
    cell = f"the record of {record.policy.method} at keep ratio {record.policy.keep_ratio:g}"
    if len(latency.baseline) != len(latency.candidate) or not latency.baseline:
        raise KnormError(
            f"{cell} has {len(latency.baseline)} baseline and {len(latency.candidate)} candidate runs; "
            "wanted at least one pair: measure it again"
        )
    if memory.baseline_cache_bytes <= 0:
        raise KnormError(f"{cell} has a full cache of {memory.baseline_cache_bytes} bytes; measure it again")
    for run in (*latency.baseline, *latency.candidate):
        if not (0 < run.ttft_s < math.inf and 0 < sum(run.gaps_s) < math.inf):
            raise KnormError(
                f"{cell} has a run with a TTFT of {run.ttft_s} s and {len(run.gaps_s)} gaps of "
                f"{sum(run.gaps_s)} s in all; wanted times above 0 and at least 2 new tokens: measure it again"
            )
    _check_scores(record, cell)
    for item in record.retrieval.items if record.retrieval else ():
        if not all(math.isfinite(answer.nll) for answer in (item.full, item.candidate)):
            raise KnormError(f"{cell} has an answer without a finite score, {item.label}; measure it again")
    return record


def _check_scores(record: Record, cell: str) -> None:
    if not record.quality.documents:
        raise KnormError(f"{cell} has no scored document; wanted at least one: measure it again")
    for document in record.quality.documents:
        where = f"{cell}, document {document.document},"
        before, after = document.baseline_nll, document.candidate_nll
        if len(before) != len(after) or not before:
            raise KnormError(
                f"{where} has {len(before)} baseline and {len(after)} candidate tokens; "
                "wanted the same tokens scored through both caches: measure it again"
            )
        for name in ("token_kl", "local_nll", "decoded_nll"):
            given = len(getattr(document, name))
            if given not in (0, len(before)):
                raise KnormError(
                    f"{where} has {given} values of {name} for {len(before)} scored tokens; "
                    "wanted one for each, or none: measure it again"
                )
        losses = (*before, *after, *document.local_nll, *document.decoded_nll)
        unusable = [nll for nll in losses if not abs(nll) <= LARGEST_NATS]
        divergences = (document.kl, *document.token_kl)
        unusable += [figure for figure in (*divergences, document.top1_agreement) if not math.isfinite(figure)]
        if unusable:
            raise KnormError(
                f"{where} has a score of {unusable[0]}; wanted finite values, and negative log-likelihoods of at most "
                f"{LARGEST_NATS:g} nats: use a wider dtype, such as float32"
            )
