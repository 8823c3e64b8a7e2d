"""`kvtier plan`: finds the cheapest memory and disk that reach a target on a trace, and prints the option for vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvtier.cli import replay_options as replay
from kvtier.cli.result_files import check_outputs, write_json, write_result
from kvtier.cli.transfer_config import printed, transfer_config
from kvtier.cli.vllm_config import check, extra_config
from kvtier.errors import ConfigError
from kvtier.simulator import plan_report, planner
from kvtier.simulator.formats import load_trace
from kvtier.simulator.planner import Plan, decide, worth_trying
from kvtier.simulator.prices import Prices, Target, price_all
from kvtier.simulator.report import facts
from kvtier.simulator.runs import replay_all
from kvtier.simulator.setup import Machine, Setup, combinations
from kvtier.simulator.sizes import sizes_in_blocks
from kvtier.simulator.trace import Trace
from kvtier.types import Admission

EXIT_MISSED = 1


ModelOption = Annotated[str, typer.Option(help="A config.json, its folder, or a known model.")]
GpuRateOption = Annotated[float, typer.Option(help="Dollars per hour of the accelerators behind --prefill-rate.")]
DramPriceOption = Annotated[float, typer.Option(help="Dollars for a GiB of memory, bought.")]
DiskPriceOption = Annotated[float, typer.Option(help="Dollars for a GiB of disk, bought.")]
HitRateOption = Annotated[float | None, typer.Option(help="Share of the blocks that must be found, 0 to 1.")]
FirstTokenOption = Annotated[float | None, typer.Option(help="Seconds within which 95% of the first tokens must come.")]
MaxWritesOption = Annotated[
    float | None, typer.Option(help="Most whole writes of the disk per day, in hours like the busiest.")
]
WritesOption = Annotated[
    float, typer.Option(help="Whole writes per day that the disk is made for; with more it lasts less long.")
]
MonthsOption = Annotated[float, typer.Option(help="Over which memory and disks are written off.")]
DramOption = Annotated[str | None, typer.Option(help="Sizes to try, with commas; chosen from the trace if absent.")]
DiskOption = Annotated[str | None, typer.Option(help="Likewise; 0 for none.")]
PathOption = Annotated[str, typer.Option(help="Directory of the disk tier, for the option that is printed.")]


def plan(
    trace: replay.TraceArgument,
    model: ModelOption,
    gpu_rate: GpuRateOption,
    dram_price: DramPriceOption,
    disk_price: DiskPriceOption,
    target_hit_rate: HitRateOption = None,
    target_ttft_p95: FirstTokenOption = None,
    max_drive_writes: MaxWritesOption = None,
    drive_writes: WritesOption = Prices.drive_writes,
    months: MonthsOption = Prices.months,
    dram: DramOption = None,
    disk: DiskOption = None,
    policy: replay.PolicyOption = "lru",
    admission: replay.AdmissionOption = Admission.ALWAYS,
    path: PathOption = "/cache",
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
) -> None:
    """Find the cheapest configuration that meets a target, and print the option that makes vLLM use it.

    Exit code 0: found; it may be to buy nothing. 1: none of those tried meets the target. 2: a trace, a price, a target
    or a file to write cannot be used; one line says why.
    """
    check_outputs(plot=plot, json=json_path)
    prices = Prices(gpu_rate, dram_price, disk_price, months, drive_writes)
    target = make_target(target_hit_rate, target_ttft_p95, max_drive_writes)
    options = replay.engine_options(option, load_deadline)
    with replay.tracked(f"reading {trace.name}") as progress:
        loaded = load_trace(trace, tokens_per_block, conversation_gap, progress)
    block_bytes, doubling = replay.block_bytes_and_doubling(loaded, model, kv_dtype)
    speed = replay.prefill_speed(prefill_rate, prefill_curve, doubling)
    machine = replay.make_machine(speed, host_bandwidth, disk_read, disk_write, disk_latency)
    base = Setup("", 0, 0, block_bytes, admission, replay.settings_of(options))
    setups = setups_to_try(loaded, base, dram, disk, replay.policies_of(policy))
    with replay.tracked(f"replaying {len(setups)} configurations") as progress:
        results = replay_all(loaded, setups, machine, processes=processes, progress=progress)
    found = decide(loaded, machine, price_all(results, prices), prices, target)
    if found.chosen is not None and found.chosen.buys:
        found = replace(found, option=vllm_option(found.chosen.result.setup, machine, loaded, path, options))
    write(found, plot, json_path)
    if found.chosen is None:
        raise typer.Exit(EXIT_MISSED)


def write(found: Plan, plot: Path | None, json_path: Path | None) -> None:
    """Print the plan, and write it to the given files."""
    show(found)
    if plot is not None:
        write_result(plot, plan_report.plan_page(found))
    if json_path is not None:
        write_json(json_path, plan_report.plan_json(found))


def make_target(hit_rate: float | None, first_token_p95: float | None, drive_writes: float | None) -> Target:
    """Return the target from the options of the command.

    Raises:
        ConfigError: an option is out of range.
    """
    if hit_rate is not None and not 0 < hit_rate <= 1:
        raise ConfigError("target_hit_rate", hit_rate, "above 0 and at most 1")
    if first_token_p95 is not None and not first_token_p95 > 0:
        raise ConfigError("target_ttft_p95", first_token_p95, "seconds, above 0")
    if drive_writes is not None and not drive_writes > 0:
        raise ConfigError("max_drive_writes", drive_writes, "above 0")
    return Target(hit_rate, first_token_p95, drive_writes)


def setups_to_try(trace: Trace, base: Setup, dram: str | None, disk: str | None, policies: list[str]) -> list[Setup]:
    """Return the configurations to simulate: `base` with every combination of memory, disk and policy.

    Args:
        dram, disk: sizes from the options; None: sizes are chosen from the trace. If both are None, disks of less than
            twice the memory are left out.

    Raises:
        ConfigError: a size holds no block.
    """
    block_bytes = base.block_bytes
    drams, disks = ([size // block_bytes for size in sizes] for sizes in planner.candidate_sizes(trace, block_bytes))
    if dram is not None:
        drams = sizes_in_blocks("dram", dram, trace, block_bytes)
    if disk is not None:
        disks = sizes_in_blocks("disk", disk, trace, block_bytes, least=0)
    setups = combinations(base, drams, disks, policies)
    return setups if dram is not None or disk is not None else [setup for setup in setups if worth_trying(setup)]


def vllm_option(setup: Setup, machine: Machine, trace: Trace, path: str, options: Mapping[str, Any]) -> str:
    """Return the option for `vllm serve` that configures the simulated setup.

    It contains the trace's block size: with smaller blocks an engine finds more of each prompt, and makes other
    transfers, than the replay.

    Args:
        path: directory of the disk tier.
        options: keys of the engine's configuration that the user gave.

    Raises:
        ConfigError: kvtier would not start with this configuration.
    """
    disks = [f"{path}:{setup.disk_bytes}"] if setup.disk_blocks else []
    extra: dict[str, Any] = extra_config(str(setup.dram_bytes), disks, [f"eviction_policy={setup.policy}"])
    extra |= {"block_size": trace.tokens_per_block, "prefill_rate": machine.prefill_rate, **options}
    for tier in extra.get("secondary_tiers", ()):
        tier["eviction_policy"] = setup.policy
        if setup.admission is not Admission.ALWAYS:
            tier["admission"] = setup.admission.value
    check(extra, trace.tokens_per_block)
    return printed(transfer_config(extra))


def show(found: Plan) -> None:
    """Print the frontier, the choice and the option."""
    console = Console(markup=False, emoji=False, highlight=False)
    for line in facts(found.trace, found.block_bytes, found.machine):
        console.print(line, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    last = len(plan_report.HEADER) - 1
    for index, name in enumerate(plan_report.HEADER):
        table.add_column(name, justify="left" if index in (0, last) else "right", overflow="fold")
    for offer in plan_report.best_offers(found):
        table.add_row(*plan_report.offer_row(offer, found.chosen), style=None if offer.buys else "dim")
    count = len(found.offers) - 1
    heading = f"of {count} configurations, those that find more than any other for what memory and disk cost:"
    console.print(f"\n{heading}\n", soft_wrap=True)
    Console(width=max(console.width, 170), markup=False, emoji=False).print(table)
    console.print(f"\n{plan_report.advice(found)}", soft_wrap=True)
    if found.option:
        console.print()
        console.print(found.option, soft_wrap=True)
    for remark in plan_report.remarks_on(found):
        console.print(f"\n{remark}", soft_wrap=True)
