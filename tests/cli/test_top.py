"""`kvtier top` against a server of metrics: what happened between two looks, for people and for programs."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.top import view
from kvtier.cli.watching.exposition import Sample, parse
from kvtier.cli.watching.figures import figures_of

ENGINE = 'engine="0",model_name="m"'
BEFORE = f"""
# HELP vllm:kvtier_hit_blocks_total Blocks loaded to the device, by the tier they came from
# TYPE vllm:kvtier_hit_blocks_total counter
vllm:kvtier_hit_blocks_total{{{ENGINE},tier="primary"}} 100.0
vllm:kvtier_hit_blocks_total{{{ENGINE},tier="disk"}} 50.0
vllm:kvtier_stored_blocks_total{{{ENGINE},source="device"}} 10.0
vllm:kvtier_saved_tokens_total{{{ENGINE},tier="disk"}} 1000.0
vllm:kvtier_wait_seconds_count{{{ENGINE},outcome="loaded"}} 4.0
vllm:kvtier_wait_seconds_sum{{{ENGINE},outcome="loaded"}} 2.0
vllm:kvtier_read_bytes_total{{{ENGINE},tier="disk"}} 0.0
vllm:kvtier_failed_blocks_total{{{ENGINE},tier="disk",cause="corrupt"}} 1.0
vllm:kvtier_off{{{ENGINE},reason="fault"}} 0.0
vllm:kvtier_tier_up{{{ENGINE},tier="disk"}} 1.0
vllm:kvtier_bytes{{{ENGINE},tier="disk"}} 5e+09
vllm:kvtier_capacity_bytes{{{ENGINE},tier="disk"}} 1e+10
vllm:kvtier_load_blocks_in_flight{{{ENGINE},tier="disk"}} 3.0
vllm:num_requests_running{{{ENGINE}}} 3.0
"""
AFTER = BEFORE
for old, new in (
    ('"disk"} 50.0', '"disk"} 80.0'),
    ('"device"} 10.0', '"device"} 20.0'),
    ('"disk"} 1000.0', '"disk"} 3000.0'),
    ('"loaded"} 4.0', '"loaded"} 6.0'),
    ('"loaded"} 2.0', '"loaded"} 3.0'),
    ('"disk"} 0.0', '"disk"} 2000000.0'),
    ('"corrupt"} 1.0', '"corrupt"} 3.0'),
):
    assert AFTER.count(old) == 1
    AFTER = AFTER.replace(old, new)
UP = 'vllm:kvtier_tier_up{engine="0",model_name="m",tier="disk"} '


def sample(text, seconds):
    return Sample(seconds, dict(parse(text)))


def shown(figures, width=80):
    console = Console(width=width, record=True, file=None)
    with console.capture() as capture:
        console.print(view(figures))
    return capture.get()


@pytest.fixture(name="metrics")
def _metrics():
    """Return the texts that a server gives, one per request and the last one again, and its address."""
    texts = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = (texts.pop(0) if len(texts) > 1 else texts[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield texts, f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_happened_between_two_looks():
    figures = figures_of(sample(BEFORE, 10.0), sample(AFTER, 12.0))
    disk = next(tier for tier in figures.tiers if tier.name == "disk")
    assert figures.saved_tokens_per_second == 1000
    assert figures.waits == {"loaded": 1.0}
    assert figures.mean_wait == 0.5
    assert disk.hit_blocks_per_second == 15
    assert disk.hit_share == 30 / 40
    assert disk.read_bytes_per_second == 1e6
    assert disk.fill == 0.5
    assert disk.in_flight == (3, 0)
    assert disk.failed == {"corrupt": 1.0}
    assert figures.tiers[0].name == "primary"


def test_an_engine_that_was_started_again_counts_from_zero():
    figures = figures_of(sample(AFTER, 10.0), sample(BEFORE, 12.0))
    assert figures.saved_tokens_per_second == 500


def test_the_view_fits_80_columns_and_says_what_is_wrong():
    text = shown(figures_of(sample(BEFORE, 10.0), sample(AFTER, 12.0)))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("saved 1,000 tokens/s", "disk", "up", "75.0%", "50.0%", "3/0", "disk failed 1.0/s corrupt"):
        assert words in text
    down = figures_of(sample(BEFORE, 10.0), sample(AFTER.replace(f"{UP}1", f"{UP}0"), 12.0))
    assert "down" in shown(down)
    off = figures_of(sample(BEFORE, 10.0), sample(AFTER.replace('"fault"} 0.0', '"fault"} 1.0'), 12.0))
    assert "kvtier is off: fault" in shown(off)


def test_values_that_are_no_numbers_and_escape_sequences_of_names_are_kept_from_the_terminal():
    text = 'kvtier_bytes{tier="a\x1b[2Jb"} 1\nkvtier_bytes{tier="c"} NaN\nkvtier_bytes{tier="d"} +Inf\nkvtier_bytes x\n'
    assert list(parse(text)) == [(("bytes", frozenset({("tier", r"a\x1b[2Jb")})), 1.0)]


@pytest.mark.parametrize("name", ["[/red]", "[red]x", "[link=http://localhost]x", ":bomb:"])
def test_names_are_no_markup(metrics, name):
    texts, url = metrics
    texts[:] = [text.replace('tier="disk"', f'tier="{name}"') for text in (BEFORE, AFTER)]
    done = CliRunner().invoke(app, ["top", url, "--once", "--interval", "0.1"])
    assert (done.exit_code, done.exception) == (0, None)
    assert name in done.stdout


@pytest.mark.parametrize("value", ["1e308", "-1e308", "-1", "9" * 400, "1e19"])
def test_a_number_that_no_counter_has_is_left_out(value):
    text = AFTER.replace('"disk"} 80.0', f'"disk"}} {value}')
    assert len(list(parse(text))) == len(list(parse(AFTER))) - 1
    json.dumps(figures_of(sample(BEFORE, 10.0), sample(text, 12.0)).to_json(), allow_nan=False)


@pytest.mark.parametrize("answer", ["nonsense", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_an_answer_that_is_no_http_ends_with_one_line(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer.encode())

        thread = threading.Thread(target=serve)
        thread.start()
        done = CliRunner().invoke(app, ["top", f"http://127.0.0.1:{server.getsockname()[1]}/metrics", "--once"])
        thread.join()
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "metrics, for example" in done.stderr


def test_once_for_people_and_for_programs(metrics):
    texts, url = metrics
    texts[:] = [BEFORE, AFTER]
    result = CliRunner().invoke(app, ["top", url, "--once", "--interval", "0.1"])
    assert result.exit_code == 0, result.output
    assert "disk" in result.stdout
    texts[:] = [BEFORE, AFTER]
    result = CliRunner().invoke(app, ["top", url, "--once", "--json", "--interval", "0.1"])
    printed = json.loads(result.stdout)
    assert {tier["name"] for tier in printed["tiers"]} == {"primary", "disk"}
    assert printed["waits"]["loaded"] > 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("vllm:num_requests_running 3\n", "no engine with kvtier, or no request yet"),
        ("<html></html>", "no name here begins"),
    ],
)
def test_a_page_without_kvtier_is_refused(metrics, text, complaint):
    texts, url = metrics
    texts[:] = [text]
    result = CliRunner().invoke(app, ["top", url, "--once"])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/metrics", "file:///etc/passwd", "localhost:8000"])
def test_what_does_not_answer_ends_with_one_line(url):
    result = CliRunner().invoke(app, ["top", url, "--once"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
