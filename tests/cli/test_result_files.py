"""Files of results are there whole or not at all, and what cannot be replaced is written to as it is."""

import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cli import result_files
from kvtier.cli.result_files import json_text, write_json, write_result


def test_a_new_file_has_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path):
    mask = os.umask(0o027)
    try:
        write_result(tmp_path / "new", "1")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_result(tmp_path / "new", "\u2026")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    assert (tmp_path / "new").read_text(encoding="utf-8") == "\u2026"
    write_json(tmp_path / "new", {"a": 1})
    assert (tmp_path / "new").read_text() == '{\n "a": 1\n}\n'


def test_an_interrupted_write_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "old").write_text("former")

    def interrupt(descriptor, text):
        os.write(descriptor, text[:3].encode())
        os.close(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(result_files, "_write_to", interrupt)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            write_result(tmp_path / name, "another")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "former"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").write_text("former")
    (tmp_path / "link").symlink_to("there")
    write_result(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="nobody reads this pipe"):
        write_result(tmp_path / "pipe", "text")


def test_an_error_names_the_file_also_if_the_device_is_full():
    with pytest.raises(OSError, match="'/dev/full'"):
        write_result(Path("/dev/full"), "text")


def test_a_pipe_gets_all_of_a_long_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; sys.stdout.write(str(len(open(sys.argv[1]).read())))"
    reader = subprocess.Popen([sys.executable, "-c", code, tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    with open(tmp_path / "pipe", "w"):  # wait for the reader
        write_result(tmp_path / "pipe", "x" * 1_000_000)
    assert reader.communicate()[0] == "1000000"


def test_a_file_behind_stdout_keeps_what_was_printed_there(tmp_path):
    code = (
        "from pathlib import Path; from kvtier.cli.result_files import write_result;"
        "print('printed', flush=True); write_result(Path('/dev/stdout'), 'result\\n'); print('end')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "out").open("a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, env=environment)
    assert (tmp_path / "out").read_text() == "printed\nresult\nend\n"


def test_json_has_null_for_a_number_that_json_does_not_have():
    assert json_text({"a": [1.5, math.inf], "b": (math.nan, "x")}, indent=0).split() == (
        ["{", '"a":', "[", "1.5,", "null", "],", '"b":', "[", "null,", '"x"', "]", "}"]
    )
