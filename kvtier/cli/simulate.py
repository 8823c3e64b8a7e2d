"""`kvtier simulate`: replays a trace with caches of several sizes and policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvtier.cli import replay_options as replay
from kvtier.cli.result_files import check_outputs, write_json, write_result
from kvtier.recording.format import Header
from kvtier.simulator import live_report, report, what_if
from kvtier.simulator.again import Repeated, repeat, watch
from kvtier.simulator.formats import load_trace
from kvtier.simulator.live_run import LiveRun
from kvtier.simulator.long_prompts import long_prompts_note
from kvtier.simulator.results import Result
from kvtier.simulator.runs import replay_all
from kvtier.simulator.setup import Machine, Setup, combinations
from kvtier.simulator.sizes import around, sizes_in_blocks
from kvtier.simulator.trace import Trace
from kvtier.tiering.estimate import DOUBLING_TOKENS
from kvtier.types import Admission


def simulate(
    trace: replay.TraceArgument,
    dram: Annotated[
        str, typer.Option(help='Sizes of host memory with commas: 8GiB, 5% (of all blocks) or "unlimited".')
    ] = "8GiB",
    disk: Annotated[str, typer.Option(help="Sizes of the disk, likewise; 0 for none.")] = "0",
    policy: replay.PolicyOption = "lru",
    admission: replay.AdmissionOption = Admission.ALWAYS,
    model: replay.ModelOption = None,
    kv_dtype: replay.KvDtypeOption = "auto",
    prefill_rate: replay.RateOption = None,
    prefill_curve: replay.CurveOption = None,
    host_bandwidth: replay.HostOption = "20GB",
    disk_read: replay.ReadOption = "6GB",
    disk_write: replay.WriteOption = "3GB",
    disk_latency: replay.LatencyOption = Machine.disk_latency,
    load_deadline: replay.DeadlineOption = None,
    option: replay.EngineOption = None,
    tokens_per_block: replay.TokensOption = None,
    conversation_gap: replay.GapOption = 60.0,
    processes: replay.ProcessesOption = None,
    plot: replay.PlotOption = None,
    json_path: replay.JsonOption = None,
    as_recorded: Annotated[
        bool,
        typer.Option(
            help="Repeat a recording of kvtier call by call, as it was configured. --plot then writes a page about it,"
            " with what larger tiers would have given; sizes and policies are not used."
        ),
    ] = False,
) -> None:
    """Replay a trace through kvtier's own manager, policies and admission, in simulated time.

    Exit code 0: the table is printed. 2: a trace, a size, a policy, a speed or a file to write cannot be used; one
    line says why.
    """
    check_outputs(plot=plot, json=json_path)
    if as_recorded:
        if plot is None and json_path is None:
            show_repeated(repeat(trace))
        else:
            header, repeated, run = watch(trace)
            show_repeated(repeated)
            rate = header.prefill_rate if prefill_rate is None and prefill_curve is None else prefill_rate
            speed = replay.prefill_speed(rate, prefill_curve, DOUBLING_TOKENS)
            machine = replay.make_machine(speed, host_bandwidth, disk_read, disk_write, disk_latency)
            write_recorded(trace, header, run, machine, processes, plot, json_path)
        return
    with replay.tracked(f"reading {trace.name}") as progress:
        loaded = load_trace(trace, tokens_per_block, conversation_gap, progress)
    block_bytes, doubling = replay.block_bytes_and_doubling(loaded, model, kv_dtype)
    speed = replay.prefill_speed(prefill_rate, prefill_curve, doubling)
    machine = replay.make_machine(speed, host_bandwidth, disk_read, disk_write, disk_latency)
    base = Setup("", 0, 0, block_bytes, admission, replay.settings_of(replay.engine_options(option, load_deadline)))
    drams = sizes_in_blocks("dram", dram, loaded, block_bytes)
    disks = sizes_in_blocks("disk", disk, loaded, block_bytes, least=0)
    setups = combinations(base, drams, disks, replay.policies_of(policy))
    more = curve_setups(loaded, setups) if plot is not None else []
    with replay.tracked(f"replaying {len(setups) + len(more)} configurations") as progress:
        results = replay_all(loaded, setups + more, machine, processes=processes, progress=progress)
    results, curve = results[: len(setups)], results[len(setups) :]
    show(loaded, machine, block_bytes, results)
    if plot is not None:
        write_result(plot, report.as_page(loaded, machine, block_bytes, results, curve))
    if json_path is not None:
        values = report.as_json(loaded, machine, results, curve)
        write_json(json_path, values)


def show_repeated(again: Repeated) -> None:
    """Print what a recorded engine loaded."""
    blocks = ", ".join(f"{count:,} from {source}" for source, count in sorted(again.hits.items())) or "none"
    typer.echo(f"{again.num_records:,} calls and answers repeated, {again.num_diverged:,} could not be followed")
    typer.echo(f"blocks loaded: {blocks}")


def write_recorded(
    recording: Path,
    header: Header,
    run: LiveRun,
    machine: Machine,
    processes: int | None,
    plot: Path | None,
    json_path: Path | None,
) -> None:
    """Replay the recorded requests with larger tiers, and write the page and the figures about the recording.

    Raises:
        TraceError: the recording has no requests.
    """
    loaded = load_trace(recording)
    asked = what_if.questions(header, loaded)
    with replay.tracked(f"replaying {len(asked)} configurations") as progress:
        results = replay_all(loaded, [one.setup for one in asked], machine, processes=processes, progress=progress)
    answers = what_if.pair(asked, results)
    if plot is not None:
        write_result(plot, live_report.live_page(loaded.name, header, run, loaded, answers))
    if json_path is not None:
        write_json(json_path, live_report.live_json(run, answers))


def curve_setups(trace: Trace, setups: list[Setup]) -> list[Setup]:
    """Return setups with further sizes of the primary tier, for the page's chart of the hit rate over the size."""
    sizes = around([setup.dram_blocks for setup in setups], trace.num_unique)
    disks = list(dict.fromkeys(setup.disk_blocks for setup in setups))
    policies = list(dict.fromkeys(setup.policy for setup in setups))
    return [setup for setup in combinations(setups[0], sizes, disks, policies) if setup not in setups]


def show(trace: Trace, machine: Machine, block_bytes: int, results: list[Result]) -> None:
    """Print facts about the trace, and the table of results."""
    console = Console(markup=False, emoji=False, highlight=False)
    lines = report.facts(trace, block_bytes, machine)
    notes = long_prompts_note(trace, [result.setup for result in results]), report.overload_note(results)
    for line in filter(None, [*lines, *notes]):
        console.print(line, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(report.HEADER):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for result in results:
        table.add_row(*report.result_row(result))
    if results:
        table.add_row(*report.recompute_row(results[0]), style="dim")
    console.print()
    Console(width=max(console.width, 170), markup=False, emoji=False).print(table)
