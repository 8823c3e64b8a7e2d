"""What kvtier was started with inside vLLM: the rows of the table in docs/vllm.md. It needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DUMMY = {"load_format": "dummy"}
"""Random weights that vLLM makes itself."""


@dataclass(frozen=True)
class Combination:
    """One row.

    Attributes:
        name: of the kind of model, or vLLM's option.
        result: for the reader of the table.
        model: of `models_of_combinations.py`; "" if the row's test is another one.
        options: of the engine.
        role: vLLM's `kv_role`.
        finds: whether a prompt that comes again is found.
        says: what the log says if it is not.
        stops: what vLLM says, in any of its versions, when it does not start, or stops at the first request; none if it
            serves.
        alone: whether vLLM stops in the same way without kvtier.
        lacks: what a release of vLLM says that cannot run such a model on CPUs, with or without kvtier.
    """

    name: str
    result: str
    model: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    role: str = "kv_both"
    finds: bool = True
    says: str = ""
    stops: tuple[str, ...] = ()
    alone: bool = False
    lacks: str = ""


WORKS = "works"
NO_CONVOLUTION = "causal_conv1d_fwd_kernel_impl\" not implemented for 'Float'"
"""Of vLLM 0.30 on CPUs."""
NO_MLA = "cannot import name 'compile_flash_attn_varlen_func_from_specs'"
"""Of vLLM 0.28 on CPUs."""

COMBINATIONS = (
    Combination(
        "MLA (DeepSeek)",
        "works; on CPUs vLLM's own prefix cache is off, and kvtier alone finds prefixes",
        "mla",
        DUMMY | {"num_gpu_blocks_override": 512},
        lacks=NO_MLA,
    ),
    Combination("sliding window (Mistral)", "works, with one engine block per block", "mistral", {
        "num_gpu_blocks_override": 256,
    }),
    Combination("full and sliding layers (Gemma 3)", "works, with one engine block per block"),
    Combination(
        "Mamba without `--enable-prefix-caching`",
        "starts and finds nothing, since a block is as long as the longest request; the log says so",
        "mamba",
        DUMMY,
        finds=False,
        says="kvtier will find nothing: a block has 2048 tokens, and the longest request 2048",
        lacks=NO_CONVOLUTION,
    ),
    Combination("speculative decoding, n-gram", WORKS, "llama", {"speculative_config": {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4,
    }}),
    Combination("speculative decoding, EAGLE", WORKS, "llama", DUMMY | {"speculative_config": {
        "method": "eagle", "model": "draft", "num_speculative_tokens": 2,
    }}, lacks="TypeError: Cannot inspect kernel parameters for function"),
    Combination("chunked prefill", WORKS, "llama", {"enable_chunked_prefill": True, "max_num_batched_tokens": 256}),
    Combination(
        "`--no-enable-prefix-caching`",
        "works; kvtier alone finds prefixes",
        "llama",
        {"enable_prefix_caching": False},
    ),
    Combination(
        "`kv_role` kv_producer",
        "works as kv_both does: vLLM's OffloadingConnector ignores the role",
        "llama",
        role="kv_producer",
    ),
    Combination("`kv_role` kv_consumer", "works as kv_both does", "llama", role="kv_consumer"),
    Combination("tensor parallelism", WORKS),
    Combination("data parallelism", "works; [each engine has its own disk directory](#configure)"),
    Combination("LoRA", "works in host memory; tiers that outlive the engine need `allow_lora`"),
    Combination(
        "`block_size` or `blocks_per_chunk` with sliding windows or states",
        "refused at start, with the name of the layer: vLLM stores parts of such blocks",
    ),
    Combination(
        "async scheduling", "works with vLLM's scheduler over a simulated model; on CPUs vLLM itself never turns it on"
    ),
    Combination("`sleep`", "works on CPUs as far as vLLM sleeps there: caches are emptied, no memory is freed"),
    Combination("multimodal (Qwen2-Audio)", "works; a prompt with another sound is not found", "audio", DUMMY | {
        "skip_tokenizer_init": False,
    }),
    Combination(
        "encoder-decoder (Whisper)",
        "vLLM does not start with it: up to 0.32 with no KV connector, in 0.33 not with its offloading;"
        " `KVTierConnector` says so in a line, where 0.33 only has an assertion",
        "whisper",
        DUMMY | {"skip_tokenizer_init": False, "max_model_len": 440},
        stops=(
            "Encoder-decoder models are not currently supported with KV connectors",
            "assert isinstance(kv_cache_spec, FullAttentionSpec)",
            "vLLM cannot offload encoder-decoder models",
        ),
    ),
    Combination(
        "`--kv-cache-dtype fp8`",
        'untested: without AVX-512 or AMX vLLM does not start with it on CPUs, with or without kvtier ("FP8 KV cache on'
        ' CPU requires x86 with AVX-512 or AMX")',
        "llama",
        {"kv_cache_dtype": "fp8"},
        stops=("FP8 KV cache on CPU requires x86 with AVX-512 or AMX",),
        alone=True,
    ),
    Combination(
        "Mamba with `--enable-prefix-caching`",
        "untested: vLLM 0.32 stops at the first request on CPUs, with or without kvtier (an IndexError of its Mamba"
        " layer)",
        "mamba",
        DUMMY | {"enable_prefix_caching": True},
        stops=("in conv_ssm_forward", NO_CONVOLUTION),
        alone=True,
    ),
    Combination(
        "pipeline parallelism",
        "untested: vLLM 0.32 stops at the first request on CPUs, with or without kvtier (its second stage has no"
        " `intermediate_tensors`)",
        "llama",
        {"pipeline_parallel_size": 2},
        stops=("assert self.intermediate_tensors is not None",),
        alone=True,
    ),
)  # fmt: skip
