"""`make servers`: real servers to play with, until Ctrl-C; prints the configuration to paste, and what to try."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from typing import Any

from mooncake_server import MooncakePool, remedy, why_not
from swift_server import ACCESS_KEY, SECRET_KEY, SwiftServer
from valkey_server import ValkeyCluster, ValkeyServer

BUCKET = "kvtier"


def configuration(options: dict[str, Any], kind: str = "resp") -> dict[str, Any]:
    return {"cpu_bytes_to_use": "512MiB", "secondary_tiers": [{"type": kind, **options}]}


def show(title: str, config: dict[str, Any]) -> None:
    print(f"{title}:\n{json.dumps(config, indent=2)}\n")


def demonstration(config: dict[str, Any]) -> str:
    return f"kvtier demo --tiers {shlex.quote(json.dumps(config))}"


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        server = ValkeyServer()
        stack.callback(server.close)
        server.start()
        cluster = ValkeyCluster()
        stack.callback(cluster.close)
        cluster.start()
        show(f"One Valkey on {server.url}", configuration({"url": server.url}))
        show("A cluster of three", configuration({"url": cluster.urls, "cluster": True}))
        swift = SwiftServer()
        stack.callback(swift.close)
        swift.start().make_bucket(BUCKET)
        place = {"url": f"s3://{BUCKET}", "endpoint": swift.endpoint, "region": "us-east-1", "path_style": True}
        print(f"An S3, OpenStack Swift's:\nexport AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
        show("and", configuration({**place, "allow_http": True, "capacity": "4GiB"}, "object"))
        if reason := why_not():
            print(f"No pool of Mooncake's: {reason}; `{remedy()}` helps\n")
        else:
            pool = MooncakePool(lent_bytes=0)
            stack.callback(pool.close)
            pool.start()
            show(
                f"A pool of Mooncake's on {pool.address}",
                configuration({"master": pool.address, "segment": "1GiB"}, "mooncake"),
            )
        print("One process fills the Valkey, another answers from it:")
        print(f"{demonstration(configuration({'url': server.url}))}\n")
        print(f"For vLLM:\nkvtier vllm-config --cpu 8GiB --resp {server.url}\n")
        print("Ctrl-C ends them; what they hold is lost then.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not leave servers behind


if __name__ == "__main__":
    main()
