"""Reads a recording of an engine into pandas: how many blocks were asked for, found and stored, over time.

    python examples/recording_with_pandas.py /var/tmp/kvtier.rec --every 1s

An engine makes a recording if its configuration has a "record"; it holds hashes, no prompts.
"""

import argparse
from pathlib import Path

import pandas as pd

from kvtier.recording.reader import read_recording

KINDS = {b"N": "request", b"L": "lookup", b"P": "load", b"S": "store", b"E": "end"}


def calls_of(path):
    """Return the recorded calls as a table: seconds since the start, kind, request and number of blocks."""
    header, records = read_recording(path)
    rows = [
        (record.time, KINDS[record.kind], record.request, len(record.keys))
        for record in records
        if record.kind in KINDS
    ]
    return header, pd.DataFrame(rows, columns=["seconds", "call", "request", "blocks"])


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("recording", type=Path)
    options.add_argument("--every", default="1min", help="an interval as pandas writes it")
    chosen = options.parse_args()
    header, calls = calls_of(chosen.recording)

    print(f"{header.primary_blocks} blocks of {header.tokens_per_block} tokens in host memory, policy {header.policy}")
    per_request = calls.pivot_table(index="request", columns="call", values="blocks", aggfunc="sum", fill_value=0)
    print(per_request.reindex(columns=["lookup", "load", "store"], fill_value=0).describe().round(1))
    calls["time"] = pd.to_timedelta(calls["seconds"], unit="s")
    over_time = calls.pivot_table(index="time", columns="call", values="blocks", aggfunc="sum", fill_value=0)
    print(over_time.reindex(columns=["lookup", "load", "store"], fill_value=0).resample(chosen.every).sum())


if __name__ == "__main__":
    main()
