"""A newcomer's walk: what README.md and the examples tell a person to type, in order."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_docs import fences

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py")) + sorted((REPOSITORY / "examples").glob("*.yaml"))
WITH_VLLM = "tests/vllm/test_vllm_examples.py"
"""Runs the examples that need vLLM, whose environment is made by `make test-vllm`."""
COMMAND_OF_EXAMPLE = re.compile(r"^(?:# )? {4}((?:python|vllm serve) .*examples/.*)$", re.M)


def typed_lines(text):
    """Return the commands of a document's `sh` blocks, without their comments."""
    lines = [line.split("  #")[0].strip() for block in fences(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def pip_installs(text):
    return re.findall(r"pip install '([^']+)'", text)


def example_commands():
    """Return the command that each example tells to type, by its file; those without one are parts of others."""
    found = {path.name: COMMAND_OF_EXAMPLE.findall(path.read_text()) for path in EXAMPLES}
    return {name: commands[0] for name, commands in found.items() if commands}


# -- what can be said in a moment -----------------------------------------------------------------------------


def test_the_readme_tells_what_to_type():
    lines = typed_lines(README)
    assert lines[0].startswith("git clone https://github.com/kvtier/kvtier && cd kvtier && pip install ")
    assert [line.split()[:2] for line in lines[1:]] == [
        ["vllm", "serve"],
        ["make", "demo"],
        ["make", "test"],
        ["kvtier", "demo"],
    ]
    (program,) = fences(README, "python")
    ast.parse(program)


def test_what_is_installed_exists():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [README, *(path.read_text() for path in [*EXAMPLES, *(REPOSITORY / "docs").rglob("*.md")])]
    named = {extra for text in texts for wanted in pip_installs(text) for extra in re.findall(r"\[(.*)\]", wanted)}
    assert {"cli", "transformers"} <= named
    assert named <= set(extras)


FROM_NOWHERE = re.compile(
    r"^.*pip install (?:--?\S+ )*'kvtier(?![^']* @ git\+https://github\.com/kvtier/kvtier').*$", re.M
)


def test_no_page_installs_kvtier_from_a_package_index():
    """Until there is a release, such a line works only where kvtier is installed: errors may say it, pages may not."""
    pages = [
        REPOSITORY / "README.md",
        *EXAMPLES,
        *(REPOSITORY / "docs").rglob("*.md"),
        REPOSITORY / "examples/README.md",
    ]
    found = [(path.name, line) for path in pages for line in FROM_NOWHERE.findall(path.read_text())]
    assert [name for name, line in found if "the start stops:" not in line] == []


def test_commands_of_kvtier_take_what_they_are_given():
    """The one inside the line for vLLM runs; of others each option exists."""
    for line in typed_lines(README):
        for inner in re.findall(r"\$\((kvtier [^)]*)\)", line):
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(inner)], check=True, capture_output=True, text=True
            )
            assert json.loads(done.stdout)["kv_connector_extra_config"]["cpu_bytes_to_use"] == "32GiB"
        if line.startswith("kvtier "):
            words = shlex.split(line)
            printed = subprocess.run(
                [sys.executable, "-m", *words[:2], "--help"], check=True, capture_output=True, text=True
            )
            assert all(word in printed.stdout for word in words[2:] if word.startswith("--"))


def test_each_example_tells_how_it_is_run():
    commands = example_commands()
    assert set(commands) == {path.name for path in EXAMPLES} - {"zipped_tier.py"}
    listed = (REPOSITORY / "examples" / "README.md").read_text()
    for path in EXAMPLES:
        assert f"[{path.name}]({path.name})" in listed
    for name, command in commands.items():
        assert f"examples/{name}" in command
        if name.endswith(".py"):
            options = {word for word in shlex.split(command) if word.startswith("--")}
            assert all(f'"{option}"' in (REPOSITORY / "examples" / name).read_text() for option in options)
    for name in commands:
        if name.startswith("vllm"):
            assert name in (REPOSITORY / WITH_VLLM).read_text()


# -- the walk itself ------------------------------------------------------------------------------------------


class Newcomer:
    """Types commands into a shell of an environment that has nothing but Python, git and make."""

    def __init__(self, home: Path):
        """Make the environment, in a folder outside of the checkout."""
        self.home = home
        self.folder = home
        subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True)
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "PIP_CONFIG_FILE") if name in os.environ}
        pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        self.environment = {
            **kept,
            **pip,
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            # What is cloned is this checkout's last commit.
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": f"url.file://{REPOSITORY}.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/kvtier/kvtier",
            "GIT_CONFIG_KEY_1": "safe.directory",
            "GIT_CONFIG_VALUE_1": "*",
        }
        self.use(home / "env")

    def use(self, environment: Path):
        """Let commands be found in an environment first."""
        self.environment["PATH"] = f"{environment / 'bin'}:{self.environment['PATH']}"

    def type(self, line, **options):
        """Run a line in the shell; return what it prints."""
        command = ["bash", "-c", line]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        return done.stdout


@pytest.fixture
def newcomer(tmp_path):
    return Newcomer(tmp_path)


VLLM_IN_ITS_PLACE = """#!{python}
import json, sys
assert sys.argv[1:4] == ["serve", "Qwen/Qwen3-8B", "--kv-transfer-config"], sys.argv
print(json.loads(sys.argv[4])["kv_connector_extra_config"]["secondary_tiers"])
"""
SAVE_MODEL = "from adapters_models import *; save_tiny_model(Path('Qwen/Qwen3-0.6B'), 'x')"


@pytest.mark.soak
def test_the_readme_and_each_example_from_an_empty_environment(newcomer, valkey):
    install, serve, demo, _, shared = typed_lines(README)
    newcomer.type(install)
    newcomer.folder = newcomer.home / "kvtier"
    assert newcomer.type("kvtier --version").split()

    # vLLM is too large for here: a program in its place looks at what it is given. `make test-vllm` has the real one.
    (newcomer.home / "env/bin/vllm").write_text(VLLM_IN_ITS_PLACE.format(python=sys.executable))
    (newcomer.home / "env/bin/vllm").chmod(0o755)
    assert "'capacity': '200GiB'" in newcomer.type(serve)

    assert "13 of 13 checks passed" in newcomer.type(demo)
    newcomer.use(newcomer.folder / ".venv")
    shared = shared.replace("127.0.0.1:6379", f"127.0.0.1:{valkey.port}")
    assert "checks passed" in newcomer.type(shared)

    for wanted in sorted(
        {line for path in (REPOSITORY / "docs").rglob("*.md") for line in pip_installs(path.read_text())}
    ):
        if "git+" in wanted:
            newcomer.type(f"pip install --dry-run '{wanted}'")

    # A folder of the model's name stands for the hub, which need not be reachable.
    newcomer.type(f'PYTHONPATH=tests/adapters python -c "{SAVE_MODEL}"')
    blocks = newcomer.home / "blocks"
    (program,) = fences(README, "python")
    (newcomer.folder / "program.py").write_text(program.replace("/var/tmp/kvtier", str(blocks / "readme")))
    blocks.mkdir()
    newcomer.type("python program.py")

    for name, command in example_commands().items():
        if not name.startswith("vllm"):
            newcomer.type(command.replace("/var/tmp/", f"{blocks}/"), input="Hello.\n")
