"""Options that `simulate` and `plan` share: their checks, their conversion to the simulator's types, and progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvtier.cli.vllm_config import parse_options
from kvtier.config import TieringConfig, parse_config
from kvtier.errors import ConfigError, KVTierError
from kvtier.foreign_text import MAX_QUOTED, one_line
from kvtier.registry import POLICIES
from kvtier.simulator.geometry import Geometry, find_geometry
from kvtier.simulator.setup import SIMULATED_OPTIONS, Machine
from kvtier.simulator.sizes import split_list
from kvtier.simulator.trace import Trace
from kvtier.sizes import parse_size
from kvtier.tiering.estimate import DOUBLING_TOKENS, PrefillSpeed
from kvtier.tiering.settings import TieringSettings
from kvtier.types import Admission

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"

TraceArgument = Annotated[
    Path, typer.Argument(help="Mooncake's or Qwen-Bailian's lines, WEKA's file or folder, or a recording of kvtier.")
]
PolicyOption = Annotated[str, typer.Option(help="Eviction policies with commas, or all.")]
AdmissionOption = Annotated[Admission, typer.Option(help="Which blocks may enter the disk.")]
ModelOption = Annotated[
    str | None, typer.Option(help=f"A config.json, its folder, or a known model; {DEFAULT_MODEL} if absent.")
]
KvDtypeOption = Annotated[str, typer.Option(help="Data type of the KV cache; auto is the model's own.")]
RateOption = Annotated[
    float | None,
    typer.Option(help=f"Tokens per second that the accelerator computes of short prompts; {Machine.prefill_rate:g}."),
]
CurveOption = Annotated[
    str | None,
    typer.Option(
        help="Instead: measured tokens per second of prompts of two lengths or more, as 1k:12000,100k:5000. Without it,"
        " the model's shape says how longer prompts slow down."
    ),
]
HostOption = Annotated[str, typer.Option(help="Bytes per second between accelerator and host memory.")]
ReadOption = Annotated[str, typer.Option(help="Bytes per second read from the disk.")]
WriteOption = Annotated[str, typer.Option(help="Bytes per second written to the disk.")]
LatencyOption = Annotated[float, typer.Option(help="Seconds that each disk job takes beside moving its bytes.")]
TokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens in one block: of a trace that does not say it; blocks of one that does (WEKA, a recording) are"
        " joined to such of this size.",
    ),
]
GapOption = Annotated[float, typer.Option(min=0.0, help="Seconds between the starts of two conversations of WEKA.")]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Replays at the same time; one per processor if absent.")
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


def make_machine(speed: PrefillSpeed, host_bandwidth: str, disk_read: str, disk_write: str, latency: float) -> Machine:
    """Return the machine from the options.

    Raises:
        ConfigError: a value is no speed or is out of range.
    """
    return Machine(
        prefill_rate=speed.rate,
        prefill_doubling=speed.doubling,
        host_bandwidth=float(parse_size("host_bandwidth", host_bandwidth)),
        disk_read=float(parse_size("disk_read", disk_read)),
        disk_write=float(parse_size("disk_write", disk_write)),
        disk_latency=latency,
    )


def prefill_speed(rate: float | None, curve: str | None, doubling: float) -> PrefillSpeed:
    """Return the speed of prefill.

    Args:
        rate, curve: `--prefill-rate` and `--prefill-curve`; at most one may be given.
        doubling: tokens of context with which a token takes twice as long to compute; not used with a curve.

    Raises:
        ConfigError: both are given, or the curve is wrong.
    """
    if curve is None:
        return PrefillSpeed(Machine.prefill_rate if rate is None else rate, doubling)
    if rate is not None:
        raise ConfigError("prefill_rate", rate, "not together with --prefill-curve, which says it, too")
    try:
        return PrefillSpeed.through([_measured(point) for point in curve.split(",")])
    except (ValueError, OverflowError, ZeroDivisionError):
        allowed = "TOKENS:RATE of two different lengths of prompts at least, the longer not faster: 1k:12000,100k:5000"
        raise ConfigError("prefill_curve", curve, allowed) from None


def _measured(point: str) -> tuple[float, float]:
    """Return (tokens in a prompt, tokens per second) from a point of the curve.

    Raises:
        ValueError: the text is no such point.
    """
    tokens, _, rate = point.strip().partition(":")
    length = 1000 * float(tokens[:-1]) if tokens.endswith("k") else float(tokens)
    if not 0 < length < math.inf or not 0 < float(rate) < math.inf:
        raise ValueError(point)
    return length, float(rate)


def block_bytes_and_doubling(trace: Trace, model: str | None, kv_dtype: str) -> tuple[int, float]:
    """Return the bytes per block, and the context, in tokens, with which a token takes twice as long to compute.

    Both follow from the model. Without a model they are the trace's bytes, if it contains them, and the engine's guess
    of the context; else those of the default model.

    Raises:
        KVTierError: the model is not known, or its file does not determine the size.
    """
    if model is None and trace.block_bytes is not None:
        return trace.block_bytes, DOUBLING_TOKENS
    geometry = _geometry(model or DEFAULT_MODEL, kv_dtype)
    return geometry.token_bytes * trace.tokens_per_block, geometry.doubling


def _geometry(model: str, kv_dtype: str) -> Geometry:
    """Return a model's geometry; the error about a key of its file names the file, too."""
    try:
        return find_geometry(model, kv_dtype)
    except ConfigError as error:
        if error.key in ("model", "kv_dtype"):
            raise
        raise KVTierError(f"{one_line(model)}: {error}") from error


def policies_of(text: str) -> list[str]:
    """Return the names of policies in a comma-separated list; "all" stands for all registered policies.

    Raises:
        ConfigError: a policy is not registered.
    """
    names = list(POLICIES.names()) if text.strip() == "all" else split_list("policy", text)
    for name in names:
        POLICIES.load(name, "policy")
    return names


def engine_options(options: list[str] | None, load_deadline: float | None) -> dict[str, Any]:
    """Return the given keys of the engine's configuration, with `load_deadline` from its own option.

    Raises:
        ConfigError: a replay does not obey a key, or the load deadline is given twice.
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
    """Return the settings of an engine whose configuration has these keys.

    Raises:
        ConfigError: a value is out of range.
    """
    return parse_config({"cpu_bytes_to_use": 1, **options}, TieringConfig).settings(1, kv_events=False)


@contextmanager
def tracked(what: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar; yield a function that must be called with the share of work that is done, 0 to 1."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(one_line(what, MAX_QUOTED), total=1.0)
        yield lambda share: bar.update(task, completed=share)
