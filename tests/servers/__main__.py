"""`make servers`: real servers to play with, until Ctrl-C; prints the tier configuration to paste."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Any

from valkey_server import ValkeyCluster, ValkeyServer


def tier_of(options: dict[str, Any]) -> str:
    return json.dumps({"secondary_tiers": [{"type": "resp", **options}]}, indent=2)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        server = ValkeyServer()
        stack.callback(server.close)
        server.start()
        cluster = ValkeyCluster()
        stack.callback(cluster.close)
        cluster.start()
        print(f"One Valkey on {server.url}:\n{tier_of({'url': server.url})}\n")
        print(f"A cluster of three:\n{tier_of({'url': cluster.urls, 'cluster': True})}\n")
        print(f"For vLLM:\nkvtier vllm-config --cpu 8GiB --resp {server.url}\n")
        print("Ctrl-C ends them; what they hold is lost then.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
