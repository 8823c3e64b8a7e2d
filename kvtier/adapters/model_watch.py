"""The identity of a model as it is now. It follows changes of weights, adapters and settings while a cache is open."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from kvtier.adapters.module_state import ModuleState
from kvtier.adapters.tensor_marks import TensorEntry
from kvtier.adapters.weights_digest import digest_tensors
from kvtier.errors import ConfigError
from kvtier.log import logger

HASHING_SECONDS = 1.0
"""Most seconds that a request spends on hashing changed tensors. The tensors that are left get random digests."""

MAX_UNMARKED_BYTES = 64 << 20
"""Most bytes of tensors whose changes torch does not count. They are hashed at each request."""

_RANDOM_BYTES = 16

Digest = Callable[[Sequence[torch.Tensor], float | None], list[bytes | None]]
"""See `digest_tensors`, the one in use."""


class ModelIdentity:
    """A fingerprint of everything in a model that its KV depends on. Its owner's lock guards it.

    Attributes:
        num_changes: how often `current` has found a change; a change back to an earlier state counts, too.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        hashing_seconds: float = HASHING_SECONDS,
        max_unmarked_bytes: int = MAX_UNMARKED_BYTES,
        digest: Digest = digest_tensors,
    ) -> None:
        """Read and hash the whole model: about 0.1 s per GB on two processors.

        Raises:
            ConfigError: a module is in training mode, the bytes of a tensor cannot be read, or there are more than
                `max_unmarked_bytes` of tensors whose changes torch does not count.
        """
        self._model = model
        self._hashing_seconds = hashing_seconds
        self._max_unmarked_bytes = max_unmarked_bytes
        self._digest = digest
        self._tokens: dict[int, str] = {}
        self.num_changes = -1
        self._said: set[str] = set()
        # torch's fused optimizers write to weights without incrementing their version counters.
        self._hook = register_optimizer_step_post_hook(_count_step)
        try:
            self._follow(None, deadline=None)
        except BaseException:
            self._hook.remove()
            raise

    def close(self) -> None:
        """Stop watching optimizers; idempotent."""
        self._hook.remove()

    def current(self) -> str:
        """Return the model's present identity in hexadecimal. Equal models have equal ones, in all processes.

        After a change, only the changed tensors are hashed again. See `mark_of` for changes that cannot be noticed.

        Raises:
            ConfigError: as the constructor.
        """
        if not self._state.is_current() or (
            self._unmarked and self._digest(self._unmarked, None) != self._unmarked_digests
        ):
            self._follow(self._state, time.monotonic() + self._hashing_seconds)
        return self._fingerprint

    @property
    def form(self) -> tuple[frozenset[tuple[torch.dtype, torch.device]], list[str]]:
        """Data types and devices of the model's tensors, and its modules. While it is equal, so is the KV's shape."""
        return self._form

    def _follow(self, before: ModuleState | None, deadline: float | None) -> None:
        """Read the model's present state, and hash the tensors that are not the same as in `before`."""
        state = ModuleState(self._model)
        for place, entry in state.tensors.items():
            known = before.tensors.get(place) if before else None
            if known and entry.mark[0] is not None and entry.is_same_as(known):
                entry.digest = known.digest
        live = [(entry, state.to_read[place]) for place, entry in state.tensors.items()]
        state.to_read.clear()
        self._hash([(entry, tensor) for entry, tensor in live if entry.digest is None], deadline)
        unmarked = [(entry, tensor) for entry, tensor in live if entry.mark[0] is None]
        if sum(tensor.nbytes for _, tensor in unmarked) > self._max_unmarked_bytes:
            allowed = "weights made outside torch.inference_mode() expected: torch does not count changes of these"
            raise ConfigError("model", type(self._model).__name__, allowed)
        self._unmarked = [tensor for _, tensor in unmarked]
        self._unmarked_digests = [entry.digest for entry, _ in unmarked]
        self._form = frozenset((tensor.dtype, tensor.device) for _, tensor in live), state.modules
        self._fingerprint = self._describe(state)
        self.num_changes += 1
        self._state = state

    def _hash(self, changed: list[tuple[TensorEntry, torch.Tensor]], deadline: float | None) -> None:
        """Give digests to entries. Tied weights, which are entries of one tensor, are read once."""
        by_mark = {entry.mark[2:]: tensor for entry, tensor in changed}
        digests = dict(zip(by_mark, self._digest(list(by_mark.values()), deadline), strict=True))
        if None in digests.values():
            self._say(
                f"more weights changed than can be hashed in {self._hashing_seconds:g} s: only this cache finds the "
                "blocks that it stores from now on, until the weights change again"
            )
        for entry, _ in changed:
            entry.digest = digests[entry.mark[2:]] or os.urandom(_RANDOM_BYTES)

    def _describe(self, state: ModuleState) -> str:
        """Return the fingerprint. A part that text cannot describe has a random token, and so equals only itself."""
        self._tokens = {
            id(part): self._tokens.get(id(part)) or os.urandom(_RANDOM_BYTES).hex() for part in state.opaque.values()
        }
        if state.opaque:
            place, part = next(iter(state.opaque.items()))
            self._say(
                f"the model has parts that cannot be described, such as {place} ({type(part).__qualname__}): "
                "only this cache finds the blocks that it stores"
            )
        lines = [f"{place} {self._tokens[id(part)]}" for place, part in state.opaque.items()]
        digest = hashlib.blake2b(digest_size=_RANDOM_BYTES)
        for line in (*state.lines, *lines):
            digest.update(line.encode("utf-8", "surrogatepass") + b"\0")
        for place, entry in state.tensors.items():
            digest.update(f"{place} {entry.label}\0".encode() + (entry.digest or os.urandom(_RANDOM_BYTES)))
        return digest.hexdigest()

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("kvtier: %s", text)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Increment the version counter of each tensor of the optimizer."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"] if not tensor.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def arithmetic(device_type: str) -> str:
    """Return torch's present settings that decide how it multiplies: autocast and reduced precision."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return f"{autocast} {_matmul_precision()}"


def _matmul_precision() -> str:
    try:
        return str(torch.get_float32_matmul_precision())
    except RuntimeError:  # torch refuses its older question once the program has set precision in the newer way
        backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.mkldnn.matmul)
        return " ".join(str(backend.fp32_precision) for backend in backends)
