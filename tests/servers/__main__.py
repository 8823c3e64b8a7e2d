"""`make servers`: real servers to play with, until Ctrl-C; prints the tier configuration to paste."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Any

from swift_server import ACCESS_KEY, SECRET_KEY, SwiftServer
from valkey_server import ValkeyCluster, ValkeyServer

BUCKET = "kvtier"


def tier_of(options: dict[str, Any], kind: str = "resp") -> str:
    return json.dumps({"secondary_tiers": [{"type": kind, **options}]}, indent=2)


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
        swift = SwiftServer()
        stack.callback(swift.close)
        swift.start().make_bucket(BUCKET)
        place = {"url": f"s3://{BUCKET}", "endpoint": swift.endpoint, "region": "us-east-1", "path_style": True}
        print(f"An S3, OpenStack Swift's:\nexport AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
        print(f"{tier_of({**place, 'allow_http': True, 'capacity': '4GiB'}, 'object')}\n")
        print(f"For vLLM:\nkvtier vllm-config --cpu 8GiB --resp {server.url}\n")
        print("Ctrl-C ends them; what they hold is lost then.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not leave servers behind


if __name__ == "__main__":
    main()
