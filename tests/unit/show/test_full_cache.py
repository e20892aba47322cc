"""The full cache alone, as text."""

from __future__ import annotations

from knormpress.show.full_cache import describe_full_cache
from tests.record_factory import make_record


def test_its_figures_and_its_noise_fit_80_columns() -> None:
    record = make_record(1.0, method="full", noise=0.5, ttft_cold_s=12.345, prompt_tokens=131_072)
    lines = list(describe_full_cache(record))
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    speed, latency = record.latency.baseline_speed, record.latency
    for part in (
        "131,072 tokens, and 64 new ones, 8 times",
        f"TTFT {speed.ttft_s:.3f} s warm, 12.345 s cold",
        f"TPOT {speed.tpot_s * 1e3:.1f} ms",
        f"{speed.throughput:.2f} new tokens/s",
        "6039.8 MB",
        "peak RSS: 900.0 MB",
        f"PPL {record.quality.baseline_ppl:.3f} on 2,048 tokens, each after 131,072",
        f"noise TTFT {latency.ttft} ({latency.ttft.interval}), TPOT {latency.tpot} ({latency.tpot.interval})",
        f"throughput {latency.throughput} ({latency.throughput.interval})",
    ):
        assert part in text


def test_a_model_that_is_spread_has_its_map() -> None:
    text = "\n".join(describe_full_cache(make_record(1.0, method="full", device_map="cpu: lm_head; disk: model")))
    assert "map          cpu: lm_head; disk: model\n" in text


def test_what_was_not_measured_is_not_told() -> None:
    record = make_record(1.0, method="full")
    memory = record.memory.model_copy(update={"baseline_device": record.memory.candidate_device})
    text = "\n".join(describe_full_cache(record.model_copy(update={"memory": memory})))
    assert "cold" not in text
    assert "not available: not lower than an earlier peak" in text
