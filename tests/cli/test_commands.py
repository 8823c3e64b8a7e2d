"""The commands as a whole: `--help` knows them all and imports none of them; nothing is cut at 80 columns."""

import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvtier.cli import COMMANDS, app, load_command
from kvtier.cli.tables import folding_table


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_the_command_says_of_itself(name):
    assert " ".join(load_command(name).help.split("\n\n")[0].split()) == COMMANDS[name]


HELPED = [*COMMANDS, "bench disk"]


@pytest.mark.parametrize("name", ["", *HELPED])
def test_help_imports_no_command_and_nothing_that_is_slow_to_import(name):
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom kvtier.cli import COMMANDS, app\n"
        "done = CliRunner().invoke(app, sys.argv[1:])\n"
        "assert done.exit_code == 0 and 'Usage: ' in done.stdout, done\n"
        "assert not {'numpy', 'msgspec', 'yaml', 'rich.console'} & set(sys.modules)\n"
        "print([name for name in COMMANDS if f'kvtier.cli.{name}'.replace('-', '_') in sys.modules])"
    )
    words = [sys.executable, "-c", program, *name.split(), "--help"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", HELPED)
@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_help_is_what_the_command_itself_would_say(monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", width)
    written = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
    monkeypatch.setattr("kvtier.cli.command_of_page", lambda *_: None)
    own = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
    if name == "bench":  # typer cuts the lines about a group's commands
        written, own = (text.partition("Commands:")[0] for text in (written, own))
    assert written == own


def test_help_that_is_asked_for_beside_options_is_the_commands_own():
    for words in (
        ["simulate", "--dram", "1GiB", "--help"],
        ["simulate", "trace", "--help"],
        ["bench", "none", "--help"],
    ):
        assert CliRunner().invoke(app, words).exit_code == (2 if "none" in words else 0)


@pytest.mark.parametrize("name", ["", *(name for name in COMMANDS if name != "bench"), "bench disk"])
def test_help_cuts_nothing_at_80_columns(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
    assert "\u2026" not in shown
    _, _, rest = shown.partition("\n")
    assert "..." not in rest
    assert max(map(len, shown.splitlines())) <= 80
    if name and name != "bench disk":
        for option in load_command(name).params:
            assert option.hidden or all(one in shown for one in getattr(option, "opts", ()) if one.startswith("-"))


def test_a_narrow_table_folds_and_shows_all():
    table = folding_table(("tier", "bytes"), left=("tier",))
    table.add_row("a-tier-with-a-long-name", "123456789 GiB")
    console = Console(width=20)
    with console.capture() as capture:
        console.print(table)
    shown = capture.get()
    assert "\u2026" not in shown
    assert "".join(sorted(shown.replace(" ", ""))).count("9") == 1
    assert set("a-tier-with-a-long-name123456789GiB") <= set(shown)
