"""Which files are a model's weights, and what is told apart: every edit of any of them."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from kvtier.testing.patience import wait_for
from kvtier.weights.file_digests import StoppedError
from kvtier.weights.weight_files import (
    UnknownWeightsError,
    blob_name,
    digest_files,
    identify_files,
    process_started_at,
    weight_files,
)

HIDDEN, LAYERS, VOCABULARY = 256, 6, 4000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.k_proj.bias": (HIDDEN // 4,),
    "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tensors():
    random = np.random.default_rng(0)
    names = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    names["model.embed_tokens"] = (VOCABULARY, HIDDEN)
    return {name: random.standard_normal(shape, dtype=np.float32).astype(np.float16) for name, shape in names.items()}


def save(file, tensors):
    """Write tensors one after the other behind a header of fixed length, as checkpoints have it."""
    header = json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}).encode().ljust(8192)
    file.write_bytes(header + b"".join(tensor.tobytes() for tensor in tensors.values()))


def one_row(tensors):
    tensors["model.embed_tokens"][-1] = 0.5


def one_number(tensors):
    tensors["model.embed_tokens"][1234, 56] += np.float16(1)


def norms(tensors):
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor *= np.float16(1.7)


def one_projection(tensors):
    tensors["model.layers.3.self_attn.k_proj"] += np.float16(0.3)


def biases(tensors):
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor += np.float16(0.01)


@pytest.mark.parametrize("edit", [one_row, one_number, norms, one_projection, biases])
def test_training_of_a_few_numbers_makes_other_weights(tmp_path, tensors, edit):
    file = tmp_path / "model.safetensors"
    save(file, tensors)
    before = digest_files([file])
    assert digest_files([file]) == before
    edited = {name: tensor.copy() for name, tensor in tensors.items()}
    edit(edited)
    save(file, edited)
    assert digest_files([file]) != before
    save(file, tensors)
    assert digest_files([file]) == before


def test_nothing_but_the_standard_library_is_needed():
    code = "import sys, kvtier.weights.weight_files; print({'torch', 'vllm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- which files ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    for name in (
        *("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "config.json"),
        *("modeling_own.py", "hf_quant_config.json", "kv_scales/scales.json", "2_Dense/model.bin"),
        *("README.md", "tokenizer.json", "generation_config.json", "optimizer.pt", "rng_state_0.pth"),
        *("training_args.bin", ".cache/model.safetensors", "checkpoint-500/model.safetensors"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(folder, source=None):
    return {str(file.relative_to(folder)) for file in weight_files(source or folder)}


def test_weights_and_what_computes_with_them(folder):
    assert names(folder) == {
        *("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "config.json"),
        *("modeling_own.py", "hf_quant_config.json", "kv_scales/scales.json", "2_Dense/model.bin"),
    }


@pytest.mark.parametrize(
    "name",
    ["model-2.safetensors", "config.json", "modeling_own.py", "kv_scales/scales.json", "2_Dense/model.bin"],
)
def test_each_of_them_counts(folder, name):
    before = digest_files(weight_files(folder))
    (folder / name).write_text("x" * len(name))
    assert digest_files(weight_files(folder)) != before


def test_a_name_counts_and_a_place_does_not(folder, tmp_path):
    before = digest_files(weight_files(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    assert digest_files(weight_files(moved)) == before
    (moved / "model-1.safetensors").rename(moved / "model-0.safetensors")
    assert digest_files(weight_files(moved)) != before


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "pth", "gguf", "tensors"])
def test_one_file_of_each_kind_is_enough(tmp_path, suffix):
    (tmp_path / f"weights.{suffix}").write_bytes(b"w")
    assert names(tmp_path) == {f"weights.{suffix}"}


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownWeightsError, match="no files of weights"):
        weight_files(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        weight_files(tmp_path / "nowhere")


def test_an_index_names_shards_that_are_elsewhere(folder):
    index = {"weight_map": {"a": "checkpoint-500/model.safetensors", "b": "model-1.safetensors", "c": "missing"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "checkpoint-500/model.safetensors" in names(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000, "\udcff"])
def test_an_index_of_nonsense_is_a_file_like_others(folder, text):
    (folder / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "model.safetensors.index.json" in names(folder)


def test_links_are_followed_and_rings_of_them_end(folder, tmp_path):
    (folder / "ring").symlink_to(folder)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "part.safetensors").write_text("a")
    (folder / "parts").symlink_to(parts)
    before = digest_files(weight_files(folder))
    assert "parts/part.safetensors" in names(folder)
    (parts / "part.safetensors").write_text("b")
    assert digest_files(weight_files(folder)) != before
    (tmp_path / "link").symlink_to(folder)
    assert digest_files(weight_files(tmp_path / "link")) == digest_files(weight_files(folder))


def test_one_gguf_comes_with_its_shards_and_its_projector(tmp_path):
    for name in ("q4-00001-of-00002", "q4-00002-of-00002", "q8-00001-of-00002", "other", "mmproj-f16"):
        (tmp_path / f"{name}.gguf").write_text(name)
    assert names(tmp_path, tmp_path / "q4-00001-of-00002.gguf") == {
        *("q4-00001-of-00002.gguf", "q4-00002-of-00002.gguf", "mmproj-f16.gguf")
    }
    assert names(tmp_path, tmp_path / "other.gguf") == {"other.gguf", "mmproj-f16.gguf"}


# -- what cannot be told --------------------------------------------------------------------------------------


def test_files_that_vanish_or_hang_are_unknown(folder, tmp_path):
    files = weight_files(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UnknownWeightsError, match=r"model-1\.safetensors"):
        identify_files(files)
    os.mkfifo(folder / "model-1.safetensors")
    with pytest.raises(UnknownWeightsError, match="not a regular file"):
        identify_files(files)
    (folder / "model-1.safetensors").unlink()
    (folder / "model-1.safetensors").symlink_to("nowhere")
    with pytest.raises(UnknownWeightsError):
        identify_files(weight_files(folder))


def test_files_that_changed_after_they_were_loaded_are_unknown(folder):
    files = weight_files(folder)
    latest = max(file.stat().st_ctime for file in files)
    assert identify_files(files, loaded_after=latest).num_files == len(files)
    with pytest.raises(UnknownWeightsError, match="changed after this process had started"):
        identify_files(files, loaded_after=latest - 1)


def everything_in(folder):
    return [folder, *folder.rglob("*")]


def exchange(place, new, moment):
    """Put `new` in the place of `place` by renames, as a deployment does, later than `moment` by the files' clock."""
    former = place.with_name("former")

    def swap():
        place.rename(former)
        new.rename(place)
        if place.lstat().st_ctime > moment:
            return True
        place.rename(new)
        former.rename(place)
        return False

    wait_for(swap, "the clock of the filesystem")


@pytest.mark.parametrize("what", ["folder", "folder above", "link"])
def test_other_weights_in_the_place_of_those_that_were_loaded_are_unknown(folder, tmp_path, what):
    """Files keep their times when a folder above them, or a link to it, is exchanged."""
    for name in ("models", "new-models"):
        shutil.copytree(folder, tmp_path / name / "m")
    (tmp_path / "models" / "current").symlink_to("m")
    (tmp_path / "models" / "next").symlink_to("../new-models/m")
    loaded = tmp_path / "models" / ("current" if what == "link" else "m")
    moment = max(file.lstat().st_ctime for file in everything_in(tmp_path))
    files = weight_files(loaded)
    assert identify_files(files, loaded_after=moment).num_files == len(files)
    if what == "folder":
        exchange(loaded, tmp_path / "new-models" / "m", moment)
    elif what == "folder above":
        exchange(tmp_path / "models", tmp_path / "new-models", moment)
    else:
        exchange(loaded, tmp_path / "models" / "next", moment)
    with pytest.raises(UnknownWeightsError, match="exchanged after this process had started"):
        identify_files(weight_files(loaded), loaded_after=moment)


def test_what_else_comes_and_goes_beside_the_weights_is_no_exchange(folder, tmp_path):
    files, moment = weight_files(folder), max(file.lstat().st_ctime for file in everything_in(tmp_path))

    def come_and_go():
        for place in (tmp_path, folder):
            (place / "later").mkdir()
            (place / "later").rmdir()
        return min(tmp_path.stat().st_ctime, folder.stat().st_ctime) > moment

    wait_for(come_and_go, "the clock of the filesystem")
    assert identify_files(files, loaded_after=moment).num_files == len(files)


@pytest.mark.parametrize("index", ["pipe", "huge"])
def test_an_index_that_is_none_is_not_read(folder, index):
    path = folder / "other.safetensors.index.json"
    if index == "pipe":
        os.mkfifo(path)
        with pytest.raises(UnknownWeightsError, match="not a regular file"):
            identify_files(weight_files(folder))
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
        assert path in weight_files(folder)


def test_a_process_knows_when_it_started(tmp_path):
    (tmp_path / "before").touch()
    code = "from kvtier.weights.weight_files import process_started_at; print(process_started_at())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (tmp_path / "after").touch()
    before, after = ((tmp_path / name).stat().st_ctime for name in ("before", "after"))
    assert before <= float(said) <= after + 2 / os.sysconf("SC_CLK_TCK")
    assert process_started_at() < before


def test_it_can_be_stopped(folder):
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        identify_files(weight_files(folder), stop)


# -- the cache of a hub ---------------------------------------------------------------------------------------

SHA256, SHA1 = "ab" * 32, "cd" * 20


@pytest.fixture
def repository(tmp_path):
    """Return a repository in a hub's cache: one large file and one small one, as its client leaves them."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    for blob, name in ((SHA256, "model.safetensors"), (SHA1, "config.json"), ("ef" * 32, "sub/part.safetensors")):
        (repository / "blobs" / blob).write_text(f"content of {name}")
        os.utime(repository / "blobs" / blob, (1e9, 1e9))
        link = snapshot / name
        link.symlink_to(os.path.relpath(repository / "blobs" / blob, link.parent))
    return repository


@pytest.fixture
def snapshot(repository):
    return repository / "snapshots" / "0123abcd"


def test_large_files_of_a_hub_are_known_by_their_names(snapshot):
    found = identify_files(weight_files(snapshot))
    assert (found.num_files, found.num_named) == (3, 2)
    assert "2 identified by their SHA-256" in found.describe()
    assert blob_name(snapshot / "config.json") == SHA1


def test_other_blobs_are_other_weights(repository, snapshot):
    before = digest_files(weight_files(snapshot))
    (snapshot / "model.safetensors").unlink()
    (repository / "blobs" / ("0" * 64)).write_text("content of model.safetensors")
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{'0' * 64}")
    assert digest_files(weight_files(snapshot)) != before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_blob_that_was_written_to_is_read(snapshot, name, keeps_time):
    before = digest_files(weight_files(snapshot))
    size = (snapshot / name).stat().st_size
    with (snapshot / name).open("r+b") as handle:  # through the link, as a script that saves over it does
        handle.write(b"C")
    if keeps_time:
        wait_for_another_tick(snapshot)
        os.utime(snapshot / name, (1e9, 1e9))
    assert (snapshot / name).stat().st_size == size
    assert blob_name(snapshot / name) is None
    assert digest_files(weight_files(snapshot)) != before


def wait_for_another_tick(folder):
    """Wait until the filesystem's clock has moved on."""
    marker = folder.parent / "marker"
    marker.touch()
    first = marker.stat().st_ctime_ns
    while marker.stat().st_ctime_ns == first:
        marker.touch()


def test_a_later_link_does_not_make_a_changed_blob_good(repository, snapshot):
    with (snapshot / "model.safetensors").open("r+b") as handle:
        handle.write(b"C")
    wait_for_another_tick(snapshot)
    later = repository / "snapshots" / "4567"
    later.mkdir()
    (later / "model.safetensors").symlink_to(f"../../blobs/{SHA256}")
    assert blob_name(later / "model.safetensors") is None


@pytest.mark.parametrize(
    "layout",
    [
        "hub/other--owner--name/snapshots/r/model.safetensors",
        "hub/models--owner--name/revisions/r/model.safetensors",
        "models/name/model.safetensors",
    ],
)
def test_a_link_that_only_looks_like_a_hubs_is_read(tmp_path, layout):
    link = tmp_path / layout
    blobs = link.parent.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    (blobs / SHA256).write_text("a")
    os.utime(blobs / SHA256, (1e9, 1e9))
    link.symlink_to(blobs / SHA256)
    assert blob_name(link) is None
    before = digest_files([link])
    (blobs / SHA256).write_text("b")
    assert digest_files([link]) != before


def test_a_link_out_of_the_repository_or_a_blob_that_is_a_link_is_read(tmp_path, snapshot, repository):
    (tmp_path / SHA256).write_text("content of model.safetensors")
    os.utime(tmp_path / SHA256, (1e9, 1e9))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / SHA256)
    assert blob_name(snapshot / "model.safetensors") is None
    (repository / "blobs" / SHA256).unlink()
    (repository / "blobs" / SHA256).symlink_to(tmp_path / SHA256)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{SHA256}")
    assert blob_name(snapshot / "model.safetensors") is None


def test_a_plain_file_in_a_snapshot_is_read(snapshot):
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").write_text("a")
    assert identify_files(weight_files(snapshot)).num_named == 1


def test_what_a_hub_brought_after_the_start_counts_as_loaded(snapshot):
    assert identify_files(weight_files(snapshot), loaded_after=0.0).num_files == 3
    with (snapshot / "model.safetensors").open("r+b") as handle:
        handle.write(b"C")
    with pytest.raises(UnknownWeightsError):
        identify_files(weight_files(snapshot), loaded_after=0.0)
