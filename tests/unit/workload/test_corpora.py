"""Where a text comes from, and how it is cut: nothing here asks the network."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from hypothesis import given
from hypothesis import strategies as st

from knormpress.errors import KnormError
from knormpress.workload import corpora
from knormpress.workload.corpora import describe_source, documents, load_corpus

ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n"]


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty datasets cache, and no hub."""
    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(corpora, "hub_reachable", lambda: False)
    return cache


def write_split(folder: Path, rows: list[str]) -> Path:
    folder.mkdir(parents=True)
    path = folder / "wikitext-test.arrow"
    with ArrowWriter(path=str(path), features=datasets.Features({"text": datasets.Value("string")})) as writer:
        for row in rows:
            writer.write({"text": row})
        writer.finalize()
    return path


def in_cache(cache: Path, revision: str) -> Path:
    return cache / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / revision


def test_without_a_hub_the_text_is_the_built_in_prose_and_the_notice_says_so() -> None:
    corpus = load_corpus()
    assert "pydoc_data.topics" in corpus.name
    assert "hub can't be reached" in corpus.notice
    assert "\n" not in corpus.notice
    assert len(corpus.text) > 300_000
    assert corpus.text == load_corpus("prose").text
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def test_wikitext_by_name_without_a_hub_is_an_error() -> None:
    with pytest.raises(KnormError, match=r"hub can't be reached.*prose"):
        load_corpus("wikitext")


@pytest.mark.parametrize("spec", [None, "wikitext"])
def test_cached_wikitext_is_used_without_a_hub(nothing_cached: Path, spec: str | None) -> None:
    write_split(in_cache(nothing_cached, "b08601e"), ROWS)
    corpus = load_corpus(spec)
    assert corpus.name == "WikiText-2 (raw, test)"
    assert corpus.text == "\n\n".join(ROWS)
    assert "WikiText-2 (raw, test)" in corpus.notice
    assert "local datasets cache" in corpus.notice


def test_of_several_cached_revisions_the_newest_counts_and_a_half_made_one_does_not(nothing_cached: Path) -> None:
    for age, revision in enumerate(["new.incomplete", "new", "old"]):
        path = write_split(in_cache(nothing_cached, revision), [revision])
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert load_corpus("wikitext").text == "new"


def test_a_broken_cache_falls_back_to_the_prose_and_says_why(nothing_cached: Path) -> None:
    write_split(in_cache(nothing_cached, "b08601e"), ROWS).write_bytes(b"not an arrow file")
    corpus = load_corpus()
    assert "pydoc_data.topics" in corpus.name
    assert "local datasets cache (ArrowInvalid" in corpus.notice
    with pytest.raises(KnormError, match=r"local datasets cache \(ArrowInvalid"):
        load_corpus("wikitext")


def test_wikitext_comes_from_the_hub_where_it_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus()
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert corpus.text == "\n\n".join(ROWS)
    assert "from the hub" in corpus.notice


def test_the_hub_is_not_asked_when_datasets_is_told_to_stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "hub_reachable", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "pydoc_data.topics" in load_corpus().name


def test_loading_leaves_the_settings_of_datasets_as_they_were(nothing_cached: Path) -> None:
    write_split(in_cache(nothing_cached, "b08601e"), ROWS)
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    load_corpus("wikitext")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


def test_a_text_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "café.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "Grüße,\r\nworld\n".encode())
    corpus = load_corpus(str(path))
    assert (corpus.name, corpus.text, corpus.source) == ("café.txt", "Grüße,\r\nworld\n", str(path.resolve()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no text file"),
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"caf\xe9", "UTF-8 text (byte 3)"),
        (b"GGUF\0\0\0\3", "is binary"),
        ("a folder", "can't be read"),
    ],
)
def test_a_file_that_is_no_text_is_an_error_in_one_line(tmp_path: Path, content: bytes | str | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(KnormError) as caught:
        load_corpus(str(path))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "wanted" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_describe_source_follows_what_is_there(monkeypatch: pytest.MonkeyPatch, nothing_cached: Path) -> None:
    assert describe_source().startswith("Python documentation")
    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    assert "from the hub" in describe_source()
    write_split(in_cache(nothing_cached, "b08601e"), ROWS)
    assert "local datasets cache" in describe_source()


@given(length=st.integers(1, 20), count=st.integers(1, 20), spare=st.integers(0, 100))
def test_documents_never_overlap_and_are_spread_evenly(length: int, count: int, spare: int) -> None:
    tokens = length * count + spare
    cut = documents(torch.arange(tokens), length=length, count=count)
    starts = [int(document[0]) for document in cut]
    assert len(cut) == count
    assert [document.tolist() for document in cut] == [list(range(start, start + length)) for start in starts]
    steps = [after - before for before, after in pairwise([*starts, tokens])]
    assert starts[0] == 0
    assert min(steps) >= length
    assert max(steps) - min(steps) <= 1


def test_a_text_that_is_too_short_says_how_long_it_is_and_how_long_it_must_be() -> None:
    with pytest.raises(KnormError, match=r"2,999 tokens.* 3 documents of 1,000 .*3,000"):
        documents(torch.arange(2999), length=1000, count=3)


@pytest.mark.parametrize(("length", "count"), [(0, 1), (1, 0), (-5, 2)])
def test_documents_of_nothing_are_refused(length: int, count: int) -> None:
    with pytest.raises(KnormError, match=f"{count} documents of {length} tokens; wanted"):
        documents(torch.arange(10), length=length, count=count)
