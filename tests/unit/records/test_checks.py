"""Records that no figure can be computed from, each with what is wrong in its message."""

from __future__ import annotations

import math
from typing import Any

import pytest

from knormpress.errors import KnormError
from knormpress.records.checks import sound
from knormpress.records.figures import Run
from knormpress.records.schema import Record
from knormpress.stats.perplexity import LARGEST_NATS
from tests.record_factory import make_record


def changed(part: str, **fields: Any) -> Record:
    record = make_record(0.9, rounds=8, documents=1, scored=10)
    return record.model_copy(update={part: getattr(record, part).model_copy(update=fields)})


def scored(**fields: Any) -> Record:
    (document,) = changed("quality").quality.documents
    return changed("quality", documents=(document.model_copy(update=fields),))


RUN = Run(ttft_s=0.5, gaps_s=(0.1, 0.0))


@pytest.mark.parametrize(
    "record",
    [
        make_record(0.9, plan=(0.5, 1.0), documents=3),
        changed("latency", baseline=(RUN,), candidate=(RUN,)),
        changed("memory", baseline_cache_bytes=1, candidate_cache_bytes=0),
        scored(candidate_nll=(LARGEST_NATS,) * 5 + (-LARGEST_NATS,) * 5),
        scored(token_kl=(), local_nll=(), decoded_nll=()),
    ],
)
def test_a_sound_record_is_handed_on(record: Record) -> None:
    assert sound(record) is record


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (changed("latency", baseline=(RUN,) * 7, candidate=(RUN,) * 8), "7 baseline and 8 candidate runs"),
        (changed("latency", baseline=(), candidate=()), "0 baseline and 0 candidate runs"),
        (changed("memory", baseline_cache_bytes=0), "0 bytes"),
        (changed("quality", documents=()), "no scored document"),
        (scored(candidate_nll=(1.0,) * 9), "document 0.* 10 baseline and 9 candidate tokens"),
        (scored(baseline_nll=(), candidate_nll=()), "0 baseline and 0 candidate tokens"),
        *[
            (scored(**{side: (1.0,) * 9 + (nll,)}), f"score of {nll}")
            for side in ("baseline_nll", "candidate_nll")
            for nll in (math.nan, math.inf, -math.inf, LARGEST_NATS + 0.1)
        ],
        *[
            (scored(**{name: (1.0,) * 9}), f"document 0.* 9 values of {name} for 10 scored tokens")
            for name in ("token_kl", "local_nll", "decoded_nll")
        ],
        *[
            (scored(**{name: (1.0,) * 9 + (math.nan,)}), "score of nan")
            for name in ("token_kl", "local_nll", "decoded_nll")
        ],
        (scored(kl=math.nan), "score of nan"),
        (scored(top1_agreement=math.inf), "score of inf"),
    ],
)
def test_an_unsound_record_is_refused(record: Record, named: str) -> None:
    with pytest.raises(KnormError, match=named) as caught:
        sound(record)
    assert "the record of knorm at keep ratio 0.9" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["baseline", "candidate"])
@pytest.mark.parametrize(
    ("ttft", "gaps", "named"),
    [
        (0.5, (), "0 gaps"),
        (0.0, (0.1,), "TTFT of 0.0 s"),
        (math.nan, (0.1,), "TTFT of nan s"),
        (math.inf, (0.1,), "TTFT of inf s"),
        (0.5, (0.0, 0.0), "2 gaps of 0.0 s"),
        (0.5, (0.1, math.inf), "2 gaps of inf s"),
    ],
)
def test_times_that_are_none_are_refused(side: str, ttft: float, gaps: tuple[float, ...], named: str) -> None:
    sound_runs = make_record(rounds=8).latency.baseline
    record = changed("latency", **{side: (*sound_runs[:7], Run(ttft_s=ttft, gaps_s=gaps))})
    with pytest.raises(KnormError, match=named):
        sound(record)
