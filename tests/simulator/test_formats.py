"""Every format is read as it is meant, and what is none is refused with its place."""

import json

import pytest

from kvtier.errors import TraceError
from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup

MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]},
    {"timestamp": 6000, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]},
]
BAILIAN = [
    {
        "chat_id": 159,
        "parent_chat_id": -1,
        "timestamp": 61.25,
        "input_length": 33,
        "output_length": 2,
        "type": "text",
        "turn": 1,
        "hash_ids": [10891234567890123456, 5, 7],
    },
    {"chat_id": 160, "parent_chat_id": 159, "timestamp": 62.5, "input_length": 20, "hash_ids": [5, 7]},
]
WEKA = {
    "id": "one",
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [
        {"t": 0.0, "type": "s", "model": "m", "in": 130, "out": 5, "hash_ids": [1, 2, 3]},
        {
            "t": 10.0,
            "type": "subagent",
            "agent_id": "a",
            "requests": [{"t": 1.5, "type": "n", "in": 64, "out": 1, "hash_ids": [1]}],
        },
        {"t": 20.0, "type": "s", "in": 200, "out": 5, "hash_ids": [1, 2, 3, 4]},
    ],
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_mooncake(tmp_path):
    trace = load_trace(write(tmp_path / "a.jsonl", MOONCAKE))
    assert (trace.format, trace.tokens_per_block, trace.num_accesses, trace.num_unique) == ("Mooncake", 512, 9, 4)
    assert trace.num_ideal_hits == 2 + 1 + 2
    assert [request.input_tokens for request in trace.requests] == [1000, 1500, 600, 600]


def test_arrivals_of_one_tick_are_spread_over_it(tmp_path):
    trace = load_trace(write(tmp_path / "a.jsonl", MOONCAKE))
    assert [request.time for request in trace.requests] == [0.0, 3.0, 4.5, 6.0]


def test_bailian(tmp_path):
    trace = load_trace(write(tmp_path / "a.jsonl", BAILIAN))
    assert (trace.format, trace.tokens_per_block, trace.num_unique) == ("Qwen-Bailian", 16, 3)
    assert [request.time for request in trace.requests] == [0.0, 1.25]


def test_weka_nests_sub_agents_with_times_of_their_own(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(WEKA, indent=1))
    trace = load_trace(path)
    assert (trace.format, trace.tokens_per_block) == ("WEKA", 64)
    assert [(request.time, len(request.keys)) for request in trace.requests] == [(0.0, 3), (11.5, 1), (20.0, 4)]
    assert trace.num_ideal_hits == 1 + 3


def test_weka_nests_sub_agents_with_times_of_the_conversation(tmp_path):
    absolute = json.loads(json.dumps(WEKA))
    absolute["requests"][1]["requests"][0]["t"] = 11.5
    trace = load_trace(write(tmp_path / "a.jsonl", [absolute]))
    assert [request.time for request in trace.requests] == [0.0, 11.5, 20.0]


@pytest.mark.parametrize(("scope", "unique"), [("local", 8), ("global", 4)])
def test_weka_ids_are_local_to_a_conversation(tmp_path, scope, unique):
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(WEKA | {"hash_id_scope": scope}))
    trace = load_trace(tmp_path, conversation_gap=100.0)
    assert (len(trace.requests), trace.num_unique) == (6, unique)
    assert trace.requests[3].time == 100.0


def test_weka_blocks_are_joined_to_larger_ones(tmp_path):
    small, middle = json.loads(json.dumps(WEKA)), json.loads(json.dumps(WEKA)) | {"block_size": 128}
    (tmp_path / "a.json").write_text(json.dumps(small))
    (tmp_path / "b.json").write_text(json.dumps(middle))
    shares = []
    trace = load_trace(tmp_path, 256, 100.0, shares.append)
    assert (trace.tokens_per_block, shares) == (256, [0.5, 1.0])
    # an engine keeps only whole blocks: 1 to 3 do not fill one of four; of twice as long ones two make one
    assert [len(request.keys) for request in trace.requests] == [0, 0, 1, 1, 0, 2]
    assert trace.num_unique == 1 + 2
    assert trace.requests[3].keys[0] == trace.requests[5].keys[0]
    assert [request.input_tokens for request in trace.requests[:3]] == [130, 64, 200]


def test_of_joined_weka_blocks_only_whole_ones_are_hit(tmp_path):
    long, short = ({"in": 64 * len(ids), "hash_ids": ids} for ids in ([1, 2, 3, 4, 5], [1, 2, 3]))
    requests = [{"t": 60.0 * number, **one} for number, one in enumerate([short, short, long, long])]
    path = write(tmp_path / "a.jsonl", [WEKA | {"requests": requests}])
    trace = load_trace(path, 256)
    assert [request.input_tokens for request in trace.requests] == [192, 192, 320, 320]
    result = Replay(trace, Setup("lru", 40, 0, 4096), Machine()).run()
    assert (result.num_requests, result.num_accesses, result.num_hits) == (4, 2, 1)
    assert (result.input_tokens, result.saved_tokens) == (1024, 256)
    with pytest.raises(TraceError, match="no request in it asks for a block of 512 tokens"):
        load_trace(path, 512)


@pytest.mark.parametrize(("tokens", "complaint"), [(None, "common size"), (100, "a multiple of the trace's 128")])
def test_weka_blocks_that_do_not_fit_one_another(tmp_path, tokens, complaint):
    for size in (64, 128):
        (tmp_path / f"{size}.json").write_text(json.dumps(WEKA | {"block_size": size}))
    with pytest.raises(TraceError, match=complaint):
        load_trace(tmp_path, tokens)


def test_larger_blocks_are_equal_only_with_all_that_precedes_them(tmp_path):
    requests = [{"t": float(n), "in": 256, "hash_ids": ids} for n, ids in enumerate([[1, 2, 3, 4], [5, 2, 3, 4]])]
    trace = load_trace(write(tmp_path / "a.jsonl", [WEKA | {"requests": requests}]), 128)
    assert trace.num_unique == 4


def test_tokens_per_block_can_be_told(tmp_path):
    assert load_trace(write(tmp_path / "a.jsonl", MOONCAKE), tokens_per_block=256).tokens_per_block == 256


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "a.jsonl: empty"),
        ("\n \n", "a.jsonl: empty"),
        ("hello\n", "a.jsonl:1: unknown format"),
        ('{"x": 1}\n', "a.jsonl:1: unknown format, known are Mooncake"),
        ('{"timestamp":0,"input_length":5,"hash_ids":[1]}\n\n{"timestamp":0,"inp', "a.jsonl:3: "),
        ('{"timestamp":0,"input_length":5,"hash_ids":[1]}\n{"timestamp":0,"input_length":5}\n', "a.jsonl:2: "),
        ('{"timestamp":-1,"input_length":5,"hash_ids":[1]}\n', "a.jsonl:1: "),
        ('{"timestamp":0,"input_length":5,"hash_ids":["a"]}\n', "a.jsonl:1: "),
        ('{"timestamp":0,"input_length":5,"hash_ids":[]}\n', "no request in it asks for a block"),
        ('{"requests":[{"t":0,"in":5}]}\n', "neither hash_ids nor requests"),
        ('{"block_size":64,"requests":[]}\n', "no request in it asks for a block"),
    ],
)
def test_a_malformed_trace_is_refused_with_the_place_of_the_fault(tmp_path, text, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path):
    for name, text in (("a.jsonl", json.dumps(MOONCAKE[0])), ("b.json", json.dumps(WEKA, indent=1))):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        assert load_trace(path).requests


def deep(path, depth):
    inner = '{"t":0,"in":5,"hash_ids":[1]}'
    path.write_text('{"requests":[' + '{"t":0,"requests":[' * depth + inner + "]}" * depth + "]}")
    return path


def test_sub_agents_nest(tmp_path):
    assert len(load_trace(deep(tmp_path / "deep.json", 100)).requests) == 1


@pytest.mark.parametrize("depth", [900, 100_000])
def test_sub_agents_nested_too_deep_are_refused(tmp_path, depth):
    with pytest.raises(TraceError, match=r"deep\.json: nested too deep"):
        load_trace(deep(tmp_path / "deep.json", depth))


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        load_trace(tmp_path / "none.jsonl")
    with pytest.raises(TraceError, match=r"without \.json or \.jsonl files"):
        load_trace(tmp_path)
