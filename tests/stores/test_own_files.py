"""What is not ours is neither opened nor changed nor deleted, and never waited for."""

import errno
import os
import socket
import subprocess
import threading

import pytest
from requirements import need_mounts

from kvtier.stores import own_files
from kvtier.stores.own_files import Folder, StrangerError, read_named


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    return place


@pytest.fixture
def folder(place):
    with Folder.open(place) as folder:
        yield folder


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


STRANGERS = {
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
    "socket": make_socket,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT])
def test_other_kinds_of_files_are_refused_without_waiting(place, folder, kind, flags):
    STRANGERS[kind](place / "name")
    with pytest.raises(StrangerError, match="name"):
        folder.open_file("name", flags)
    assert not folder.is_own_file("name")
    assert folder.unlink("name") is False
    assert os.listdir(place) == ["name"]


@pytest.mark.parametrize("kind", [kind for kind in STRANGERS if kind != "folder"])
def test_other_kinds_of_files_are_not_opened_as_folders(place, folder, kind):
    STRANGERS[kind](place / "name")
    with pytest.raises(StrangerError):
        folder.folder("name")


def test_a_link_to_a_folder_is_not_entered_and_the_configured_path_may_be_one(tmp_path, place):
    (place / "file").write_text("x")
    (tmp_path / "link").symlink_to(place)
    with Folder.open(tmp_path / "link") as configured:
        assert configured.names() == ["file"]
    with Folder.open(tmp_path) as above, pytest.raises(StrangerError):
        above.folder("link")
    with pytest.raises(StrangerError, match="symbolic link"):
        Folder.open(tmp_path / "link", follow=False)


def test_a_folder_replaced_by_a_link_is_not_followed(tmp_path, place):
    victim = tmp_path / "victim"
    victim.mkdir()
    (place / "inner").mkdir()
    with Folder.open(place) as folder, folder.folder("inner") as inner:
        (place / "inner").rename(tmp_path / "moved")
        (place / "inner").symlink_to(victim)
        os.close(inner.open_file("new", os.O_RDWR | os.O_CREAT))
        assert not folder.holds("inner", inner)
    assert os.listdir(victim) == []
    assert os.listdir(tmp_path / "moved") == ["new"]


def test_a_second_name_is_read_and_deleted_but_not_written(tmp_path, place, folder):
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", place / "name")
    os.close(folder.open_file("name"))
    with pytest.raises(StrangerError, match="hard link"):
        folder.open_file("name", os.O_RDWR)
    assert folder.unlink("name")
    assert (tmp_path / "precious").read_text() == "precious"


def test_sizes_are_bounded_before_anything_is_read(place, folder):
    (place / "giant").touch()
    os.truncate(place / "giant", 1 << 40)
    for read in (lambda: folder.read("giant", 100), lambda: read_named(place / "giant")):
        with pytest.raises(StrangerError, match="more than"):
            read()
    (place / "small").write_bytes(b"x" * 100)
    assert folder.read("small", 100) == b"x" * 100


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_a_file_that_a_person_named_is_a_plain_one(place, kind):
    STRANGERS[kind](place / "name")
    with pytest.raises(OSError, match=r"plain file|No such device"):
        read_named(place / "name")
    (place / "link").symlink_to(place / "file")
    (place / "file").write_bytes(b"secret")
    assert read_named(place / "link") == b"secret"


def test_a_file_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match="place/name"):
        folder.open_file("name")
    assert folder.unlink("name")


def test_threads_see_all_names_at_once(place, folder):
    names = {f"file{number}" for number in range(500)}
    for name in names:
        (place / name).touch()
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(set(folder.names()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found == names for found in seen)


@pytest.mark.root
def test_files_of_another_user_are_strangers(place, folder):
    (place / "file").write_text("x")
    (place / "inner").mkdir()
    for name in ("file", "inner"):
        os.chown(place / name, 12345, 12345)
    with pytest.raises(StrangerError, match="belongs to user 12345"):
        folder.open_file("file")
    with pytest.raises(StrangerError, match="belongs to user 12345"):
        folder.folder("inner")
    assert folder.unlink("file") is False


@pytest.fixture
def bind():
    """Return a function that mounts a file or folder at another place; needs root and the right to mount."""
    need_mounts()
    mounted = []

    def make(source, target):
        done = subprocess.run(["mount", "--bind", source, target], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"may not mount here: {done.stderr.strip()}")
        mounted.append(target)

    yield make
    for target in reversed(mounted):
        subprocess.run(["umount", "-l", str(target)], check=True)


@pytest.mark.root
def test_mounts_inside_are_strangers_even_from_the_same_filesystem(tmp_path, place, folder, bind):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    (place / "inner").mkdir()
    (place / "file").touch()
    bind(victim, place / "inner")
    bind(victim / "precious", place / "file")
    with pytest.raises(StrangerError, match="mounted"):
        folder.folder("inner")
    folder.folder("inner", may_be_mounted=True).close()
    with pytest.raises(StrangerError, match="mounted"):
        folder.open_file("file", os.O_RDWR)
    assert folder.unlink("file") is False
    assert folder.remove_empty("inner") is False
    assert (victim / "precious").read_text() == "precious"


def test_where_the_list_of_descriptors_is_hidden_folders_are_used_all_the_same(place, monkeypatch):
    (place / "inner").mkdir()
    real = os.open

    def hidden(path, *arguments, **options):
        if str(path).startswith("/proc/self/fdinfo"):
            raise PermissionError(errno.EACCES, "hidden")
        return real(path, *arguments, **options)

    monkeypatch.setattr(own_files.os, "open", hidden)
    with Folder.open(place) as folder, folder.folder("inner") as inner:
        os.close(inner.open_file("file", os.O_RDWR | os.O_CREAT))
