"""Loads a model and its tokenizer from the packaged model, a folder or the hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtier.cli.demonstration.packaged_model import MODEL_NAME, ModelUnavailableError, ensure_converted
from kvtier.cli.demonstration.progress import Narrator
from kvtier.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        name: as shown to people.
        source: a folder or hub id, from which another process can load it.
    """

    model: Any
    tokenizer: Any
    name: str
    source: str


def load_model(source: str | None, dtype: str, threads: int, narrator: Narrator) -> LoadedModel:
    """Load a model in evaluation mode and fix torch's thread count.

    Args:
        source: a folder or an id on the hub; None for the packaged SmolLM2.
        dtype: a name in `DTYPES`.

    Raises:
        ConfigError: an unknown data type.
        ModelUnavailableError: the model cannot be found or read.
    """
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    name = source or MODEL_NAME
    if source is None:
        source = str(ensure_converted(lambda gguf, folder: _convert(gguf, folder, narrator)))
    with narrator.step(f"loading {name} in {dtype}"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype]).eval()
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelUnavailableError(f"model {name} cannot be loaded: {reason}") from error
    return LoadedModel(model, tokenizer, name, source)


def warm_up(model: Any, narrator: Narrator) -> None:
    """Run the model once: a first run also allocates memory and starts threads, which would be measured."""
    with narrator.step("warming up"), torch.inference_mode():
        model(input_ids=torch.zeros((1, 256), dtype=torch.long, device=model.device))


def _convert(gguf: Path, folder: Path, narrator: Narrator) -> None:
    from transformers import GgufConfig  # needs the package gguf, which other models do not need

    with narrator.step(f"converting {gguf.name}, once (about a minute)"):
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        settings = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**place, quantization_config=settings, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
