"""`kvtier schema` prints a schema that every documented configuration obeys, and no misspelled one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BUILT_IN = {"disk", "resp", "object", "filesystem", "mooncake", "memory"}


@pytest.fixture(scope="module")
def schema():
    command = [sys.executable, "-m", "kvtier", "schema"]
    return json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)


def examples():
    """Return all configurations that the documents show as JSON, alone or within a longer line."""
    decoder, found = json.JSONDecoder(), []
    for document in DOCUMENTS:
        text = document.read_text()
        for begin in re.finditer(r"\{", text):
            try:
                value, _ = decoder.raw_decode(text, begin.start())
            except ValueError:
                continue
            if "cpu_bytes_to_use" in value:
                found.append(pytest.param(value, id=f"{document.name}-{begin.start()}"))
    return found


@pytest.mark.parametrize("example", examples())
def test_documented_configurations_obey_it(schema, example):
    jsonschema.validate(example, schema)


def test_the_documents_show_some():
    assert len(examples()) >= 5


@pytest.mark.parametrize(
    "tier",
    [
        {"type": "disk", "path": ["/a", "/b"], "capacity": 1 << 40, "admission": "prompt_only", "name": "nvme"},
        {"type": "example", "custom_param": 3},
        {"type": "OwnTier", "module_path": "own", "anything": [1]},
        {"type": "object", "url": "s3://b", "capacity": "1TB", "ttl": None},
    ],
)
def test_tiers_of_all_kinds_obey_it(schema, tier):
    jsonschema.validate({"cpu_bytes_to_use": "1GiB", "secondary_tiers": [tier]}, schema)


@pytest.mark.parametrize(
    "tier",
    [
        {"type": "tape"},
        {"type": "disk", "path": "/a"},
        {"type": "disk", "path": "/a", "capacity": "1TB", "treads": 3},
        {"type": "disk", "path": "/a", "capacity": "1TB", "threads": 65},
        {"type": "disk", "path": "/a", "capacity": "1TB", "eviction_policy": "newest"},
        {"type": "resp", "url": "redis://a", "ttl": 0.5},
        {"type": "resp", "url": "redis://a", "admission": "never"},
        {"type": "memory", "capacity": True},
    ],
)
def test_what_kvtier_refuses_does_not_obey_it(schema, tier):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"cpu_bytes_to_use": "1GiB", "secondary_tiers": [tier]}, schema)


def test_every_option_has_a_description(schema):
    properties = schema["$defs"]["TieringConfig"]["properties"]
    tiers = {tier["title"]: tier for tier in properties["secondary_tiers"]["items"]["anyOf"] if "title" in tier}
    assert tiers.keys() == BUILT_IN
    for options in (properties, *(tier["properties"] for tier in tiers.values())):
        for name, option in options.items():
            assert option.get("description"), name
