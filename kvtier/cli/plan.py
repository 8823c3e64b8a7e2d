"""`kvtier plan`: the cheapest memory and disk that reach a target on a trace, and the option that configures them."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvtier.cli.outputs import check_outputs
from kvtier.cli.replay_options import (
    GapOption,
    HostOption,
    JsonOption,
    KvDtypeOption,
    LatencyOption,
    PlotOption,
    ProcessesOption,
    RateOption,
    ReadOption,
    TokensOption,
    TraceArgument,
    WriteOption,
    block_bytes_of,
    make_machine,
    policies_of,
)
from kvtier.cli.simulate_progress import tracked
from kvtier.cli.vllm_config import check, extra_config, transfer_config
from kvtier.errors import ConfigError
from kvtier.simulator import plan_report, planner
from kvtier.simulator.formats import load_trace
from kvtier.simulator.planner import Plan, Prices, Target, worth_trying
from kvtier.simulator.report import facts
from kvtier.simulator.runs import replay_all
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.sizes import size_in_blocks, split_list
from kvtier.simulator.trace import Trace
from kvtier.types import Admission

EXIT_MISSED = 1


def plan(
    trace: TraceArgument,
    model: Annotated[str, typer.Option(help="A config.json, its folder, or a known model.")],
    gpu_rate: Annotated[float, typer.Option(help="Dollars an hour of the accelerators behind --prefill-rate.")],
    dram_price: Annotated[float, typer.Option(help="Dollars for a GiB of memory, bought.")],
    disk_price: Annotated[float, typer.Option(help="Dollars for a GiB of disk, bought.")],
    target_hit_rate: Annotated[
        float | None, typer.Option(help="Share of the blocks that must be found, 0 to 1.")
    ] = None,
    target_ttft_p95: Annotated[
        float | None, typer.Option(help="Seconds within which 95% of the first tokens must come.")
    ] = None,
    max_drive_writes: Annotated[float | None, typer.Option(help="Most whole writes of the disk a day.")] = None,
    months: Annotated[float, typer.Option(help="Over which memory and disks are written off.")] = Prices.months,
    dram: Annotated[
        str | None, typer.Option(help="Sizes to try, with commas; chosen from the trace if absent.")
    ] = None,
    disk: Annotated[str | None, typer.Option(help="Likewise; 0 for none.")] = None,
    policy: Annotated[str, typer.Option(help="Eviction policies to try, with commas, or all.")] = "lru",
    admission: Annotated[Admission, typer.Option(help="Which blocks may enter the disk.")] = Admission.ALWAYS,
    path: Annotated[str, typer.Option(help="Directory of the disk tier, for the option that is printed.")] = "/cache",
    kv_dtype: KvDtypeOption = "auto",
    prefill_rate: RateOption = Machine.prefill_rate,
    host_bandwidth: HostOption = "20GB",
    disk_read: ReadOption = "6GB",
    disk_write: WriteOption = "3GB",
    disk_latency: LatencyOption = Machine.disk_latency,
    tokens_per_block: TokensOption = None,
    conversation_gap: GapOption = 60.0,
    processes: ProcessesOption = None,
    plot: PlotOption = None,
    json_path: JsonOption = None,
) -> None:
    """Find the cheapest configuration that meets a target, and print the option that makes vLLM use it.

    To buy nothing is an offer like the others, and then there is no option to print.

    Exit code 0: there is one. 1: none of those tried meets the target. 2: a trace, a model, a price, a size or a
    file to write cannot be used; one line says why.
    """
    check_outputs(plot, json_path)
    prices = Prices(gpu_rate, dram_price, disk_price, months)
    target = make_target(target_hit_rate, target_ttft_p95, max_drive_writes)
    machine = make_machine(prefill_rate, host_bandwidth, disk_read, disk_write, disk_latency)
    loaded = load_trace(trace, tokens_per_block, conversation_gap)
    block_bytes = block_bytes_of(loaded, model, kv_dtype)
    setups = setups_to_try(loaded, block_bytes, dram, disk, policies_of(policy), admission)
    with tracked(f"replaying {len(setups)} configurations") as progress:
        results = replay_all(loaded, setups, machine, processes=processes, progress=progress)
    offers = planner.price_all(results, machine, prices)
    chosen = planner.cheapest(offers, target)
    option = ""
    if chosen is not None and chosen.buys:
        option = vllm_option(chosen.result.setup, machine, loaded.tokens_per_block, path)
    edge = planner.edge_note(offers, chosen, loaded) if chosen is not None else ""
    found = Plan(loaded, machine, block_bytes, target, offers, chosen, option, edge)
    show(found)
    if plot is not None:
        plot.write_text(plan_report.plan_page(found), encoding="utf-8")
    if json_path is not None:
        json_path.write_text(json.dumps(plan_report.plan_json(found), indent=1) + "\n", encoding="utf-8")
    if chosen is None:
        raise typer.Exit(EXIT_MISSED)


def make_target(hit_rate: float | None, first_token_p95: float | None, drive_writes: float | None) -> Target:
    """Return the target that the options give.

    Raises:
        ConfigError: one is out of range.
    """
    if hit_rate is not None and not 0 < hit_rate <= 1:
        raise ConfigError("target_hit_rate", hit_rate, "above 0 and at most 1")
    if first_token_p95 is not None and not first_token_p95 > 0:
        raise ConfigError("target_ttft_p95", first_token_p95, "seconds, above 0")
    if drive_writes is not None and not drive_writes > 0:
        raise ConfigError("max_drive_writes", drive_writes, "above 0")
    return Target(hit_rate, first_token_p95, drive_writes)


def setups_to_try(
    trace: Trace, block_bytes: int, dram: str | None, disk: str | None, policies: list[str], admission: Admission
) -> list[Setup]:
    """Return the configurations to simulate.

    Raises:
        ConfigError: a size that holds no block.
    """
    drams, disks = planner.candidate_sizes(trace, block_bytes)
    dram_blocks = [size // block_bytes for size in drams]
    disk_blocks = [size // block_bytes for size in disks]
    if dram is not None:
        dram_blocks = [size_in_blocks("dram", text, trace, block_bytes) for text in split_list("dram", dram)]
    if disk is not None:
        disk_blocks = [size_in_blocks("disk", text, trace, block_bytes, least=0) for text in split_list("disk", disk)]
    setups = planner.candidates(dram_blocks, disk_blocks, policies, block_bytes, admission)
    return setups if dram is not None or disk is not None else [setup for setup in setups if worth_trying(setup)]


def vllm_option(setup: Setup, machine: Machine, tokens_per_block: int, path: str) -> str:
    """Return the option for `vllm serve` that configures what was simulated.

    The block size goes with it: smaller blocks would find more of each prompt, in other transfers, than was replayed.

    Raises:
        ConfigError: kvtier would not start so.
    """
    disks = [f"{path}:{setup.disk_bytes}"] if setup.disk_blocks else []
    extra: dict[str, Any] = extra_config(str(setup.dram_bytes), disks, [f"eviction_policy={setup.policy}"])
    extra |= {"block_size": tokens_per_block, "prefill_rate": machine.prefill_rate}
    for tier in extra.get("secondary_tiers", ()):
        tier["eviction_policy"] = setup.policy
        if setup.admission is not Admission.ALWAYS:
            tier["admission"] = setup.admission.value
    check(extra, tokens_per_block)
    return f"--kv-transfer-config {shlex.quote(transfer_config(extra))}"


def show(found: Plan) -> None:
    """Print the frontier, the choice and the option."""
    console = Console(markup=False, emoji=False, highlight=False)
    for line in facts(found.trace, found.block_bytes, found.machine):
        console.print(line, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for index, name in enumerate(plan_report.HEADER):
        table.add_column(name, justify="left" if index in (0, len(plan_report.HEADER) - 1) else "right")
    for offer in plan_report.best_offers(found):
        table.add_row(*plan_report.offer_row(offer, found.chosen), style=None if offer.buys else "dim")
    count = len(found.offers) - 1
    heading = f"of {count} configurations, those that find more than any other for what memory and disk cost:"
    console.print(f"\n{heading}\n", soft_wrap=True)
    Console(width=max(console.width, 140)).print(table)
    console.print(f"\n{plan_report.advice(found)}", soft_wrap=True)
    if found.option:
        console.print()
        console.print(found.option, soft_wrap=True)
    if found.edge:
        console.print(f"\n{found.edge}", soft_wrap=True)
