"""What names the weights that an engine has loaded, wherever they come from, and when nothing does."""

import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from kvtier.adapters.vllm import identity
from kvtier.adapters.vllm.identity import UnknownWeightsError, alike_release, weights_of_engine
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.testing.patience import PATIENCE_SECONDS

LONG_AGO = 1e9


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "process_started_at", lambda: 4e9)  # the test's files are older


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model")


def save(folder, content="weights"):
    folder.mkdir()
    (folder / "model.safetensors").write_text(content)
    (folder / "config.json").write_text("{}")
    return folder


def model_of(path, hf=None, **keys):
    defaults = {"model": str(path), "revision": None, "seed": 0, "model_weights": ""}
    return SimpleNamespace(**(defaults | keys), hf_config=SimpleNamespace(**({"_commit_hash": None} | (hf or {}))))


def engine_of(model, draft=None, load_format="auto", extra=None, cache=None):
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(**(cache or {})),
        speculative_config=SimpleNamespace(draft_model_config=draft) if draft else None,
        load_config=SimpleNamespace(
            load_format=load_format, download_dir=None, model_loader_extra_config=extra if extra is not None else {}
        ),
    )


def weights(model, trust=False, **keys):
    return weights_of_engine(engine_of(model, **keys), trust)[0]


def unknown(model, **keys):
    with pytest.raises(UnknownWeightsError) as caught:
        weights(model, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_bytes_count_wherever_the_folder_is(folder, tmp_path):
    before = weights(model_of(folder))
    assert weights(model_of(shutil.copytree(folder, tmp_path / "copy"))) == before
    (folder / "model.safetensors").write_text("Weights")
    assert weights(model_of(folder)) != before


def test_the_draft_model_counts(folder, tmp_path):
    draft = save(tmp_path / "draft", "draft")
    before = weights(model_of(folder), draft=model_of(draft))
    (draft / "model.safetensors").write_text("Draft")
    assert weights(model_of(folder), draft=model_of(draft)) != before != weights(model_of(folder))


def test_further_parts_that_a_model_names_count(folder, tmp_path):
    model = model_of(folder, hf={"audio_model_id": str(save(tmp_path / "audio", "a")), "text_model_id": None})
    before = weights(model)
    (tmp_path / "audio" / "model.safetensors").write_text("b")
    assert weights(model) != before


def test_how_they_are_read_counts(folder):
    options = {"pattern": "other"}
    found = [weights(model_of(folder)), weights(model_of(folder), load_format="pt")]
    found.append(weights(model_of(folder), extra=options))
    assert len({json.dumps(one) for one in found}) == 3


def test_random_weights_are_named_by_their_seed(tmp_path):
    assert weights(model_of(tmp_path / "nowhere"), load_format="dummy")["weights"] == "random, seed 0"


def test_one_gguf_file(tmp_path):
    (tmp_path / "model-Q4.gguf").write_text("a")
    (tmp_path / "model-Q8.gguf").write_text("b")
    before = weights(model_of(tmp_path / "model-Q4.gguf"))
    (tmp_path / "model-Q8.gguf").write_text("c")
    assert weights(model_of(tmp_path / "model-Q4.gguf")) == before
    (tmp_path / "model-Q4.gguf").write_text("c")
    assert weights(model_of(tmp_path / "model-Q4.gguf")) != before


@pytest.mark.parametrize("url", ["s3://bucket/model", "gs://bucket/model"])
def test_weights_in_an_object_store_are_unknown(folder, url):
    """vLLM puts a folder of configurations in the place of the model, and the address beside it."""
    model = model_of(folder, model_weights=url)
    assert url in unknown(model, load_format="runai_streamer")
    assert weights(model, trust=True)["weights"] == url


def test_what_tensorizer_reads(folder, tmp_path):
    (tmp_path / "model.tensors").write_text("a")
    local = {"tensorizer_uri": str(tmp_path / "model.tensors")}
    before = weights(model_of(folder), load_format="tensorizer", extra=local)
    (tmp_path / "model.tensors").write_text("b")
    assert weights(model_of(folder), load_format="tensorizer", extra=local) != before
    remote = {"tensorizer_uri": "s3://bucket/model.tensors"}
    assert "s3://bucket" in unknown(model_of(folder), load_format="tensorizer", extra=remote)
    assert "not known" in unknown(model_of(folder), load_format="tensorizer")
    assert "s3://bucket" in unknown(
        model_of(folder), load_format="tensorizer", extra=SimpleNamespace(tensorizer_uri="s3://bucket/x")
    )


@pytest.mark.parametrize("load_format", ["ipc_cache", "modelexpress", "somebodys_own"])
def test_loaders_that_read_who_knows_what_are_unknown(folder, load_format):
    assert repr(load_format) in unknown(model_of(folder), load_format=load_format)
    assert weights(model_of(folder), trust=True, load_format=load_format)["weights"] == str(folder)


def test_a_model_that_is_not_here_is_unknown(tmp_path):
    assert "owner/name" in unknown(model_of("owner/name"))
    assert "no files of weights" in unknown(model_of(tmp_path))


def test_names_are_trusted_where_asked(folder):
    trusted = weights(model_of(folder), trust=True)
    (folder / "model.safetensors").write_text("other")
    assert weights(model_of(folder), trust=True) == trusted
    assert weights(model_of("owner/name", revision="v1"), trust=True)["weights"] == "owner/name v1"


def test_weights_that_changed_since_they_were_loaded_are_unknown(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setattr(identity, "process_started_at", lambda: LONG_AGO)
    assert "changed after this process had started" in unknown(model_of(folder))
    assert "the link" in unknown(model_of(tmp_path / "link"))


def test_scales_that_first_requests_decide_are_unknown(folder):
    assert "calculate_kv_scales" in unknown(model_of(folder), cache={"calculate_kv_scales": True})


@pytest.mark.parametrize(
    ("version", "device", "same"),
    [("0.28.0", "cpu", True), ("0.30.0", "cpu", True), ("0.31.0", "cpu", False), ("0.28.0", "cuda", False)],
)
def test_releases_that_were_proven_alike_share_a_name(version, device, same):
    assert (alike_release(version, device) == alike_release("0.32.0", "cpu")) is same
    assert same or version in alike_release(version, device)


# -- in a worker ----------------------------------------------------------------------------------------------


def worker_that(identify):
    spec = SimpleNamespace(config=SimpleNamespace(engine_id="nobody", rank=0), num_blocks=1, block_bytes=4096)
    return KVTierOffloadingWorker(spec, None, dict, False, identify)


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UnknownWeightsError("they are elsewhere"), "they are elsewhere"),
        (KeyError("a foreign one"), "KeyError: 'a foreign one'"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
    ],
)
def test_a_worker_that_cannot_read_them_says_why(error, said):
    worker = worker_that(lambda stop: fail(error))
    try:
        weights = worker._wait_for_weights()
        assert (weights.identity, weights.problem) == (None, said)
    finally:
        worker.shutdown()


def test_a_worker_that_reads_ends_at_once():
    stopped = threading.Event()

    def read(stop):
        stop.wait(PATIENCE_SECONDS)
        stopped.set()
        return {}, ""

    worker = worker_that(read)
    worker.shutdown()
    assert stopped.wait(PATIENCE_SECONDS)
    assert worker._wait_for_weights() is not None


def test_the_digest_is_found_where_neither_vllm_nor_torch_can_be_imported(folder):
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from kvtier.weights.weight_files import digest_files, weight_files\n"
        f"print(digest_files(weight_files(Path({str(folder)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == weights(model_of(folder))["weights"]
