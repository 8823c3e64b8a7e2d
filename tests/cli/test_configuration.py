"""Every command that takes a configuration takes the same: YAML and JSON, kvtier's own and what vLLM takes."""

import json
import sys

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.configuration import errors_in, read_config
from kvtier.errors import ConfigError, KVTierError

YAML = """
cpu_bytes_to_use: 64MiB
secondary_tiers:
  - {type: disk, path: FOLDER/kv, capacity: 64MiB}  # a comment
"""

BOMB = "\n".join(f"y{count}: &a{count + 1} [*a{count}, *a{count}]" for count in range(40))
"""Aliases that make 2**40 values of a first one."""


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(name="own")
def _own(tmp_path):
    """Return the values of a configuration whose disk is below this folder."""
    disk = {"type": "disk", "path": f"{tmp_path}/kv", "capacity": "64MiB"}
    return {"cpu_bytes_to_use": "64MiB", "secondary_tiers": [disk]}


@pytest.fixture(name="yaml")
def _yaml(tmp_path):
    file = tmp_path / "engine.yaml"
    file.write_text(YAML.replace("FOLDER", str(tmp_path)))
    return file


@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c.yml", "c", "c.conf"])
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_files_of_both_kinds_are_read_alike(tmp_path, own, yaml, name, form):
    text = yaml.read_text() if form == "yaml" else "\ufeff" + json.dumps(own)
    (tmp_path / name).write_text(text)
    for given in (str(tmp_path / name), f"@{tmp_path / name}"):
        assert read_config("config", given).values == own
    assert read_config("config", json.dumps(own)) == (own, "", "")


@pytest.mark.parametrize("form", ["json", "yaml"])
@pytest.mark.parametrize("connector", ["offloading", "kvtier"])
def test_what_vllm_config_prints_is_taken_and_printed_again(tmp_path, own, yaml, form, connector):
    printed = run("vllm-config", "--config", yaml, "--format", form, "--connector", connector).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    given = read_config("config", str(tmp_path / "printed.yaml"))
    assert given.values == {"spec_name": "KVTierOffloadingSpec", **own}
    assert run("vllm-config", "--config", tmp_path / "printed.yaml", "--format", form).stdout == printed
    assert "disk: works: " in run("doctor", "--config", tmp_path / "printed.yaml").stdout


def test_options_replace_keys_of_the_file_and_tiers_are_refused_beside_it(tmp_path, own, yaml):
    done = run("vllm-config", "--config", yaml, "--cpu", "1GiB", "--option", "load_deadline=2", "--format", "json")
    extra = json.loads(done.stdout)["kv_connector_extra_config"]
    assert (extra["cpu_bytes_to_use"], extra["load_deadline"]) == ("1GiB", 2)
    assert extra["secondary_tiers"] == own["secondary_tiers"]
    refused = run("vllm-config", "--config", yaml, "--resp", "redis://h:1")
    assert refused.exit_code == 2
    assert "resp=" in refused.stderr
    assert "--cpu SIZE or --config FILE" in run("vllm-config").stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpu_bytes_to_use: [1\nb: c", ["not valid YAML: line 2, column 2"]),
        ("a: &a [*b]", ["not valid YAML: line 1, column 8: found undefined alias"]),
        ("a: !!python/object/apply:os.system [x]", ["not valid YAML"]),
        ("- 1", ["keys and values expected"]),
        ("", ["keys and values expected"]),
        ("just words", ["keys and values expected"]),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", ["line 3", "'c' is there twice"]),
        ('{"a": 1, "a": 2}', ["'a' is there twice"]),
        ('kv-transfer-config: \'{"a": 1, "a": 2}\'', ["'a' is there twice"]),
        ("x: &a0 [1, 1]\n" + BOMB, ["more than 10,000 values"]),
        ("x: &a0 {b: 1, c: 1}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}"), ["more than 10,000 values"]),
        ("a: &a [*a]", ["contains itself"]),
        ("a: " + 5000 * "[" + 5000 * "]", ["nested too deeply"]),
        ('{"a": 1,}', ["not valid JSON", "line 1 column"]),
        ("[" * 100_000, ["config="]),
        ("a: " + "{b: " * 5000, ["config="]),
        ("kv-transfer-config: nonsense", ["kv-transfer-config=", "keys and values expected"]),
        ("kv_connector: OffloadingConnector", ["kv_connector_extra_config=", "required"]),
    ],
)
def test_a_wrong_file_is_one_line_that_says_what_and_where(tmp_path, text, words):
    file = tmp_path / ("wrong.json" if text.startswith("{") else "wrong.yaml")
    file.write_text(text)
    for command in ("doctor", "vllm-config"):
        done = run(command, "--config", file)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert str(file) in done.stderr
        for word in words:
            assert word in done.stderr


def test_a_wrong_value_names_the_file_and_the_key(tmp_path, yaml):
    yaml.write_text(yaml.read_text().replace("capacity: 64MiB", "capacity: lots"))
    for command in ("doctor", "vllm-config"):
        error = run(command, "--config", yaml).stderr
        assert f"{yaml}: secondary_tiers[0].capacity='lots'" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        'url: "redis://:hunter2@h\nb: [',
        '{"url": "redis://:hunter2@h", oops}',
        "password: *hunter2",
        "password: !hunter2 x",
        "password: !hunter2!x",
        "password: !!bool hunter2",
        "password: !!int hunter2",
        "password: !!float hunter2",
        "password: !!timestamp hunter2",
        "password: !!binary hunter2é",
    ],
)
def test_a_parser_does_not_quote_a_secret(tmp_path, text):
    file = tmp_path / ("wrong.json" if text.startswith("{") else "wrong.yaml")
    file.write_text(text)
    done = run("doctor", "--config", file)
    assert done.exit_code == 2
    assert "hunter2" not in done.output


@pytest.mark.parametrize("path", ["/nowhere/engine.yaml", "/", "/dev/zero", "x" * 5000, "a\0b"])
def test_what_cannot_be_read_is_one_line(path):
    with pytest.raises(ConfigError, match=r"\Aconfig="):
        read_config("config", path)


def test_without_pyyaml_json_is_still_read(monkeypatch, yaml, own):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvtier\[cli\]', or give JSON"):
        read_config("config", str(yaml))
    assert read_config("config", json.dumps(own)).values == own


def test_a_configuration_given_twice_is_refused(yaml):
    assert "given once" in run("doctor", yaml, "--config", yaml).stderr


def test_errors_of_a_text_have_no_file():
    with pytest.raises(ConfigError), errors_in(""):
        raise ConfigError("a", 1, "2")
    with pytest.raises(KVTierError, match=r"\Af\.yaml: a=1: 2"), errors_in("f.yaml"):
        raise ConfigError("a", 1, "2")
