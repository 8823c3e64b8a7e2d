"""What people install: the archives, the command, and the links of the page that a package index shows."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(name="archives", scope="module")
def _archives(tmp_path_factory):
    """Return the source distribution and the wheel, made as `make sdist` makes them but in this environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this folder is no git checkout, so nothing says which files are the project's: git clone it")
    return set(listed.stdout.splitlines())


def test_the_source_distribution_holds_all_files_that_tests_need(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if not name.startswith(".github/")} <= names
    assert not {name for name in names if name.endswith((".pyc", ".so")) or "__pycache__" in name}


def test_the_wheel_says_what_it_is_and_needs_little(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("/METADATA"))))
    assert not [name for name in names if not name.startswith(("kvtier/", "kvtier-"))]
    assert "kvtier/py.typed" in names
    needed = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    assert sorted(re.split(r"[<>=]", one)[0] for one in needed) == ["msgspec", "numpy", "xxhash"]
    assert len(metadata.get_all("Project-URL")) == len(PROJECT["urls"])
    assert metadata.get_all("Classifier")
    assert metadata["Author"]


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_says_which_line_brings_them(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; from kvtier.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"kvtier: the command line needs {missing}: pip install 'kvtier[cli]'\n"


def test_another_package_that_is_missing_is_an_error_of_its_own():
    program = "import sys; sys.modules['numpy'] = None; from kvtier.__main__ import main; main()"
    command = [sys.executable, "-c", program, "vllm-config", "--cpu", "1GiB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode not in (0, None)
    assert "kvtier[cli]" not in done.stderr


def test_the_shell_can_complete_commands_and_options():
    for words, wanted in (("kvtier vllm", "vllm-config"), ("kvtier vllm-config --mo", "--mooncake")):
        environment = {"_KVTIER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-c", "import sys; sys.argv[0] = 'kvtier'; from kvtier.__main__ import main; main()"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert wanted in done.stdout.split(), done.stderr


def test_links_work_on_a_package_index():
    links = [link for link in LINK.findall((REPOSITORY / "README.md").read_text()) if not link.startswith("#")]
    home = PROJECT["urls"]["Homepage"]
    own = [link for link in links if link.startswith(home)]
    assert len(own) > 5
    assert all(link.startswith("https://") for link in links)
    for link in own:
        place = re.fullmatch(rf"{home}/(?:blob|tree)/main/([^#]+)(?:#.*)?", link)
        assert place, link
        assert (REPOSITORY / place[1]).exists(), link
