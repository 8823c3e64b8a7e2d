"""The commands as a whole: `--help` knows them all and imports none of them."""

import subprocess
import sys

import pytest

from kvtier.cli import COMMANDS, load_command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_the_command_says_of_itself(name):
    assert " ".join(load_command(name).help.split("\n\n")[0].split()) == COMMANDS[name]


def test_help_imports_no_command_and_inspect_imports_only_itself():
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom kvtier.cli import COMMANDS, app\n"
        "assert CliRunner().invoke(app, sys.argv[1:]).exit_code == 0\n"
        "print([name for name in COMMANDS if f'kvtier.cli.{name}'.replace('-', '_') in sys.modules])"
    )
    for arguments, imported in ((["--help"], "[]"), (["inspect", "--help"], "['inspect']")):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == imported
