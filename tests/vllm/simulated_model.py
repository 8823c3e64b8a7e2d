"""A model without layers: what it writes for a token is a function of all tokens up to it, and of its weights.

It runs behind vLLM's worker half of a KV connector, as vLLM's model runner does. In each step it compares every byte
that vLLM counts as computed, and that attention would read, with what it would have written.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.forward_context import set_forward_context
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

_MASK = (1 << 64) - 1
_FACTORS = np.random.default_rng(0).integers(1, 1 << 63, 4096, dtype=np.uint64) | np.uint64(1)


class WrongBytesError(AssertionError):
    """vLLM counts a token as computed, and the device holds something else for it."""


def extended(digests, tokens):
    """Extend `digests`, one for each prefix, by those of further tokens."""
    digest = digests[-1] if digests else 1
    for token in tokens:
        digest = ((digest ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK
        digest ^= digest >> 31
        digests.append(digest)
    return digests


def next_token(digest):
    return 3 + (digest >> 20) % 500


def continuation(prompt, num_tokens):
    """Return what the model answers to a prompt, with whatever weights."""
    digests, answer = extended([], prompt), []
    for _ in range(num_tokens):
        answer.append(next_token(digests[-1]))
        extended(digests, answer[-1:])
    return answer


def device_memory(cache):
    """Return an int8 tensor of shape (num_blocks, page bytes) for each layer, laid out as vLLM lays it out."""
    specs = {name: group.kv_cache_spec for group in cache.kv_cache_groups for name in group.layer_names}
    tensors, backing = {}, None
    for placement in cache.kv_cache_tensors:
        if hasattr(placement, "layers"):  # from 0.30 on, all layers lie in one allocation
            backing = torch.zeros(placement.size, dtype=torch.int8) if backing is None else backing
            for index, name in enumerate(placement.layers):
                offset = placement.offset + index * placement.layer_stride
                shape = (cache.num_blocks, specs[name].page_size_bytes)
                tensors[name] = backing.as_strided(shape, (placement.block_stride, 1), offset)
        else:
            assert not placement.block_stride
            tensors |= dict.fromkeys(
                placement.shared_by, torch.zeros(placement.size, dtype=torch.int8).view(cache.num_blocks, -1)
            )
    return tensors


@dataclass
class Running:
    """What a model runner knows of a request: its tokens, a digest per prefix, and a block table per group."""

    num_prompt_tokens: int
    tokens: list[int]
    tables: list[list[int]]
    num_computed: int
    digests: list[int] = field(default_factory=list)

    def cut(self, num_tokens):
        del self.tokens[num_tokens:], self.digests[num_tokens:]


class SimulatedModel:
    """Runs the steps that a scheduler plans, over memory that a connector fills."""

    def __init__(self, vllm_config, cache, connector):
        """Args: connector: vLLM's worker half; it gets this model's memory."""
        self.weights = 0
        self.num_compared = self.num_loads = self.num_stores = self.num_resumed = 0
        self._vllm_config, self._connector = vllm_config, connector
        self._requests: dict[str, Running] = {}
        memory = device_memory(cache)
        connector.register_kv_caches(memory)
        self._groups = []
        for group in cache.kv_cache_groups:
            spec = group.kv_cache_spec
            pages = [
                (name, memory[name].numpy().view(np.uint64).reshape(cache.num_blocks, spec.block_size, -1))
                for name in group.layer_names
            ]
            self._groups.append((spec.block_size, getattr(spec, "sliding_window", None), pages))

    def execute(self, planned):
        """Do one step as vLLM's model runner does, and return its output."""
        metadata = planned.kv_connector_metadata
        self.num_loads += len(metadata.load_jobs)
        self.num_stores += len(metadata.store_jobs)
        kv_transfer_state._KV_CONNECTOR_AGENT = self._connector
        self._connector.handle_preemptions(metadata)
        self._follow(planned)
        assert not getattr(planned, "kv_cache_block_copies", None)
        with (
            set_forward_context(None, self._vllm_config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(planned) as transfers,
        ):
            # vLLM lets a request find the blocks that another one computes in the same step, so all are written first.
            for name, count in planned.num_scheduled_tokens.items():
                self._write(name, count)
            sampled = [self._attend(name, count) for name, count in planned.num_scheduled_tokens.items()]
        names = list(planned.num_scheduled_tokens)
        places = {name: index for index, name in enumerate(names)}
        return ModelRunnerOutput(names, places, sampled, kv_connector_output=transfers)

    def _follow(self, planned):
        """Learn of new requests and of new blocks of those that are known."""
        for name in planned.finished_req_ids:
            self._requests.pop(name, None)
        for new in planned.scheduled_new_reqs:
            tables = [list(blocks) for blocks in new.block_ids]
            prompt = list(new.prompt_token_ids)
            self._requests[new.req_id] = Running(len(prompt), prompt, tables, new.num_computed_tokens)
        cached = planned.scheduled_cached_reqs
        self.num_resumed += len(cached.resumed_req_ids)
        for index, name in enumerate(cached.req_ids):
            request, blocks = self._requests[name], cached.new_block_ids[index]
            request.num_computed = cached.num_computed_tokens[index]
            if name in cached.resumed_req_ids:  # an answer that was on the way when it was preempted is dropped
                request.tables = [list(of_group) for of_group in blocks]
                request.cut(request.num_prompt_tokens + cached.num_output_tokens[index])
            elif blocks is not None:
                for table, more in zip(request.tables, blocks, strict=True):
                    table += more

    def _write(self, name, count):
        """Write what the request's next `count` tokens need."""
        request = self._requests[name]
        start, end = request.num_computed, request.num_computed + count
        assert end <= len(request.tokens)
        for index, (block_size, _, pages) in enumerate(self._groups):
            blocks, offsets = self._places(request.tables[index], start, end, block_size)
            for layer, rows in pages:
                rows[blocks, offsets] = self._rows(request, start, end, layer, rows.shape[2])

    def _attend(self, name, count):
        """Compare all bytes that attention reads for the next `count` tokens, and return the token after the last."""
        request = self._requests[name]
        for index, (block_size, window, pages) in enumerate(self._groups):
            start = 0 if window is None else max(0, request.num_computed - window + 1)
            if start < request.num_computed:
                blocks, offsets = self._places(request.tables[index], start, request.num_computed, block_size)
                for layer, rows in pages:
                    self._compare(name, start, rows[blocks, offsets], layer, blocks)
        request.num_computed += count
        if request.num_computed < len(request.tokens):
            return []
        request.tokens.append(next_token(request.digests[-1]))
        return request.tokens[-1:]

    def _compare(self, name, start, found, layer, blocks):
        request = self._requests[name]
        wrong = (found != self._rows(request, start, start + len(found), layer, found.shape[1])).any(axis=1)
        if wrong.any() or not blocks.all():
            positions = start + np.flatnonzero(wrong | (blocks == 0))
            raise WrongBytesError(
                f"request {name} of {len(request.tokens)} tokens, {request.num_computed} of them computed:"
                f" {layer} holds wrong bytes for {len(positions)} tokens, {positions[0]} to {positions[-1]},"
                f" in blocks {sorted(set(blocks[positions - start].tolist()))}"
            )
        self.num_compared += found.nbytes

    @staticmethod
    def _places(table, start, end, block_size):
        positions = np.arange(start, end)
        return np.array(table)[positions // block_size], positions % block_size

    def _rows(self, request, start, end, layer, num_words):
        extended(request.digests, request.tokens[len(request.digests) : end])
        salt = np.uint64(extended([], [self.weights, *layer.encode()])[-1])
        digests = np.array(request.digests[start:end], np.uint64)
        rows = (digests ^ salt)[:, None] * _FACTORS[:num_words]
        return rows ^ (rows >> np.uint64(29))
