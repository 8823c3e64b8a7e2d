"""A vLLM engine in a process of its own, told what to do by JSON lines on its standard input.

Answers are JSON lines on the descriptor that the environment names, since vLLM prints to standard output.
"""

import json
import os
import sys
import time

ARENAS = []
"""The arenas of this process."""

MANAGERS = []
"""The managers of this process."""

BEGUN = {}
"""vLLM's own name and the answer so far of every request that was begun, by its name here."""


def remember_instances(kind, instances):
    plain = kind.__init__

    def remember(self, *args, **keywords):
        plain(self, *args, **keywords)
        instances.append(self)

    kind.__init__ = remember


def make_engine(options, keeps_rate):
    """Args: keeps_rate: kvtier takes the engine to be as slow as its configuration says, whatever it measures."""
    from vllm import LLM

    from kvtier.primary.arena import Arena
    from kvtier.tiering.estimate import PrefillSpeed
    from kvtier.tiering.manager import TieringOffloadingManager

    remember_instances(Arena, ARENAS)
    remember_instances(TieringOffloadingManager, MANAGERS)
    if keeps_rate:
        PrefillSpeed.measure = lambda self, work, seconds: None
    # Measured to work on the CPU platform; float32, since a prefill split elsewhere rounds differently in less.
    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 64,
        "disable_log_stats": False,
        "seed": 0,
    }
    return LLM(**(defaults | options))


def generate(engine, prompts, max_tokens=12, adapter=None, image=None, audio=None, **parameters):
    """Args:
    adapter: (name, number, path, load in place) of a LoRA adapter.
    image, audio: the seed of noise that each prompt has as an image or as a second of sound.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **parameters)
    media = {"image": noise_image(image)} if image is not None else {}
    media |= {"audio": noise_audio(audio)} if audio is not None else {}
    asked = [{"prompt_token_ids": prompt} | ({"multi_modal_data": media} if media else {}) for prompt in prompts]
    started = time.perf_counter()
    outputs = engine.generate(asked, sampling, use_tqdm=False, lora_request=adapter_request(adapter))
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": time.perf_counter() - started,
    }


def noise_image(seed):
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def noise_audio(seed):
    """Return (samples, samples per second)."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal(16_000).astype(np.float32), 16_000


def adapter_request(adapter):
    from vllm.lora.request import LoRARequest

    if adapter is None:
        return None
    name, number, path, in_place = adapter
    return LoRARequest(name, number, path, load_inplace=in_place)


def call_workers(engine, name, **arguments):
    """Call a method of every worker of vLLM's."""
    engine.collective_rpc(name, kwargs=arguments)


def call(engine, method, **arguments):
    """Call a method of vLLM's `LLM`, for which there is no command of its own."""
    started = time.perf_counter()
    answer = getattr(engine, method)(**arguments)
    return {"answer": repr(answer), "seconds": time.perf_counter() - started}


def abort_midway(engine, prompt, steps):
    """Start a request, abort it after some steps, and step until nothing is left to do."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    inner = engine.llm_engine
    request_id = inner.add_request(f"aborted-{time.monotonic_ns()}", {"prompt_token_ids": prompt}, sampling)
    for _ in range(steps):
        inner.step()
    running = inner.get_num_unfinished_requests()
    inner.abort_request([request_id], internal=True)
    return {"running": running, "left": inner.get_num_unfinished_requests()}


def begin(engine, prompt, max_tokens=12, steps=1):
    """Start a request, do some steps of an engine in this process, and return the request's name."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    name = f"begun-{time.monotonic_ns()}"
    BEGUN[name] = engine.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling), []
    step(engine, steps)
    return name


def step(engine, steps):
    """Do some steps of an engine in this process, and note what requests that were begun have answered."""
    for _ in range(steps):
        for output in engine.llm_engine.step():
            if output.request_id in BEGUN:
                BEGUN[output.request_id][1][:] = output.outputs[0].token_ids
    return engine.llm_engine.get_num_unfinished_requests()


def end(engine, name, abort):
    """Abort a request that was begun, or step until nothing is left to do; return its answer so far."""
    inner = engine.llm_engine
    if abort:
        inner.abort_request([BEGUN[name][0]], internal=True)
    while inner.has_unfinished_requests():
        step(engine, 1)
    return BEGUN.pop(name)[1]


def zero_host_memory():
    """Overwrite every block in host memory, behind kvtier's back; return how many arenas there were."""
    import numpy as np

    for arena in ARENAS:
        np.asarray(arena.view)[:] = 0
    return len(ARENAS)


def forget_at_load(times):
    """Let host memory lose the second block of the next loads, after a lookup has found it."""
    manager, left = MANAGERS[0], times
    whole = manager.prepare_load

    def prepare_load(keys, req_context):
        nonlocal left
        if left:
            left -= 1
            manager._table.remove(list(keys)[1:2])
        return whole(keys, req_context)

    manager.prepare_load = prepare_load


def blocks():
    """Return a digest of every block in host memory, by its key."""
    import xxhash

    slot_of, arena = MANAGERS[0]._primary.table.slot_of, ARENAS[0]
    return {key.hex(): xxhash.xxh3_128(arena.row(slot)).hexdigest() for key, slot in slot_of.items()}


def metrics(engine):
    values = {}
    for metric in engine.get_metrics():
        labels = [value for key, value in sorted(metric.labels.items()) if key not in ("engine", "model_name")]
        if hasattr(metric, "value"):
            values[".".join([metric.name.removeprefix("vllm:"), *labels])] = metric.value
    return values


def scrape():
    """Return what a server would answer at /metrics."""
    from prometheus_client import REGISTRY, generate_latest

    return generate_latest(REGISTRY).decode()


def obey(engine, command, arguments):
    if command == "generate":
        return generate(engine, **arguments)
    if command == "abort":
        return abort_midway(engine, **arguments)
    if command == "rpc":
        return call_workers(engine, **arguments)
    if command == "call":
        return call(engine, **arguments)
    if command == "answer":
        return BEGUN[arguments["name"]][1]
    if command in ("begin", "step", "end"):
        return {"begin": begin, "step": step, "end": end}[command](engine, **arguments)
    if command == "reset":
        return engine.reset_prefix_cache(**arguments)
    if command == "zero":
        return zero_host_memory()
    if command == "forget":
        return forget_at_load(**arguments)
    if command == "blocks":
        return blocks()
    if command == "scrape":
        return scrape()
    if command == "metrics":
        return metrics(engine)
    raise ValueError(command)


def main():
    replies = os.fdopen(int(os.environ["KVTIER_TEST_REPLIES"]), "w", buffering=1)
    options, more = json.loads(sys.stdin.readline())
    engine = make_engine(options, **more)
    print(json.dumps({"started": os.getpid()}), file=replies)
    for line in sys.stdin:
        command, arguments = json.loads(line)
        print(json.dumps({"result": obey(engine, command, arguments)}), file=replies)
    del engine


if __name__ == "__main__":
    main()
