"""Options that `simulate` and `plan` share, and what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvtier.cli.vllm_config import parse_options
from kvtier.config import TieringConfig, parse_config
from kvtier.errors import ConfigError
from kvtier.registry import POLICIES
from kvtier.simulator.geometry import find_geometry
from kvtier.simulator.setup import SIMULATED_OPTIONS, Machine
from kvtier.simulator.sizes import split_list
from kvtier.simulator.trace import Trace
from kvtier.sizes import parse_size
from kvtier.tiering.settings import TieringSettings

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"

TraceArgument = Annotated[
    Path, typer.Argument(help="Mooncake's or Qwen-Bailian's lines, WEKA's file or folder, or a recording of kvtier.")
]
ModelOption = Annotated[
    str | None, typer.Option(help=f"A config.json, its folder, or a known model; {DEFAULT_MODEL} if absent.")
]
KvDtypeOption = Annotated[str, typer.Option(help="Data type of the KV cache; auto is the model's own.")]
RateOption = Annotated[float, typer.Option(help="Tokens a second that the accelerator computes.")]
HostOption = Annotated[str, typer.Option(help="Bytes a second between accelerator and host memory.")]
ReadOption = Annotated[str, typer.Option(help="Bytes a second read from the disk.")]
WriteOption = Annotated[str, typer.Option(help="Bytes a second written to the disk.")]
LatencyOption = Annotated[float, typer.Option(help="Seconds that a disk job takes beside its bytes.")]
TokensOption = Annotated[int | None, typer.Option(min=1, help="Tokens in one block of the trace, if it does not say.")]
GapOption = Annotated[float, typer.Option(min=0.0, help="Seconds between the starts of two conversations of WEKA.")]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Replays at the same time; one a processor if absent.")
]
PlotOption = Annotated[Path | None, typer.Option(help="Write a page with figures to this file.")]
DeadlineOption = Annotated[
    float | None,
    typer.Option(min=0.001, help="Longest that a request waits for the disk, seconds; absent, while it is worth it."),
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option("--option", help=f"A key of the engine's configuration as KEY=VALUE: {', '.join(SIMULATED_OPTIONS)}."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


def make_machine(
    prefill_rate: float, host_bandwidth: str, disk_read: str, disk_write: str, disk_latency: float
) -> Machine:
    """Return the speeds that the options give.

    Raises:
        ConfigError: one of them is none.
    """
    return Machine(
        prefill_rate=prefill_rate,
        host_bandwidth=float(parse_size("host_bandwidth", host_bandwidth)),
        disk_read=float(parse_size("disk_read", disk_read)),
        disk_write=float(parse_size("disk_write", disk_write)),
        disk_latency=disk_latency,
    )


def block_bytes_of(trace: Trace, model: str | None, kv_dtype: str) -> int:
    """Return the bytes of one block: the trace's own if it says so and no model is named.

    Raises:
        ConfigError: no such model.
    """
    if model is None and trace.block_bytes is not None:
        return trace.block_bytes
    return find_geometry(model or DEFAULT_MODEL, kv_dtype).token_bytes * trace.tokens_per_block


def policies_of(text: str) -> list[str]:
    """Return the policies that an option names.

    Raises:
        ConfigError: one is not registered.
    """
    names = list(POLICIES.names()) if text.strip() == "all" else split_list("policy", text)
    for name in names:
        POLICIES.load(name, "policy")
    return names


def engine_options(options: list[str] | None, load_deadline: float | None) -> dict[str, Any]:
    """Return the keys of the engine's configuration that were given, `--load-deadline` among them.

    Raises:
        ConfigError: a key that a replay does not obey, or one given twice.
    """
    given = parse_options(options or [])
    for key, value in given.items():
        if key not in SIMULATED_OPTIONS:
            raise ConfigError("option", f"{key}={value}", f"what a replay obeys: {', '.join(SIMULATED_OPTIONS)}")
    if load_deadline is not None:
        if "load_deadline" in given:
            raise ConfigError("load_deadline", load_deadline, "given once, not as --option, too")
        given["load_deadline"] = load_deadline
    return given


def settings_of(options: dict[str, Any]) -> TieringSettings:
    """Return the settings of an engine with these keys.

    Raises:
        ConfigError: a value is out of range.
    """
    return parse_config({"cpu_bytes_to_use": 1, **options}, TieringConfig).settings(1, kv_events=False)
