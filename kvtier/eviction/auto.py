"""Auto: the policy whose shadow hits most, changed while the cache is in use.

Which policy is best depends on the traffic and on the size of the cache (docs/policies.md). `shadows` follows them all
on a sample, `contest` compares them, `succession` moves the keys; what is here is in charge of the policy in charge.

Its weakness: it must see several turnovers of the cache before it knows, and a policy that takes over begins without
the memory that it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.contest import Contest, PolicySwitch
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.shadows import Shadows
from kvtier.eviction.succession import Succession
from kvtier.eviction.tinylfu import TinyLFUPolicy
from kvtier.keys import OffloadKey

FOLLOWED: Mapping[str, type[EvictionPolicy]] = {
    "lru": LRUPolicy,
    "arc": ARCPolicy,
    "s3fifo": S3FIFOPolicy,
    "tinylfu": TinyLFUPolicy,
    "prefix": PrefixPolicy,
}
"""The built-in policies, by the names under which they are registered."""

FIRST = "prefix"
"""In charge at the beginning: of all tables in docs/policies.md the one that is never far from the best."""

_MAX_STEPS = 3
_MAX_STEPS_OF_SMALL = 28
_SMALL = 1024
"""Of a cache with fewer keys, shadows see one in eight or more: they would fall behind."""

_STEPS_A_BATCH = 2


class ShadowedPolicy(EvictionPolicy):
    """A policy, with shadows of all others and of other sizes beside it.

    The shadows see what the policy sees. Replaying costs an insert some microseconds, whatever it brings: one batch in
    one shadow, up to three while many batches wait (more in small caches).

    Attributes:
        on_switch: called when another policy takes over, at the end of an insert; set it to learn of that.
    """

    on_switch: Callable[[PolicySwitch], None] | None = None

    def __init__(
        self,
        capacity: int,
        name: str = FIRST,
        kinds: Mapping[str, type[EvictionPolicy]] = FOLLOWED,
        may_switch: bool = False,
    ) -> None:
        """Put a policy in charge.

        Args:
            name: of the policy, one of `kinds`.
            kinds: the policies that are followed, by name.
            may_switch: whether the best takes over.
        """
        super().__init__(capacity)
        self._first, self._kinds, self._may_switch = name, dict(kinds), may_switch
        self._name = name
        self._policy: EvictionPolicy = self._kinds[name](capacity)
        self._most_steps = _MAX_STEPS if capacity >= _SMALL else _MAX_STEPS_OF_SMALL
        self._succession: Succession | None = None
        self._shadows = Shadows(capacity, self._kinds, name)
        self._uses = self._shadows.uses
        self._contest = Contest(self._kinds)

    @property
    def name(self) -> str:
        """Name of the policy in charge."""
        return self._name

    @property
    def is_moving(self) -> bool:
        """Whether the former policy still holds keys."""
        return self._succession is not None

    def stats(self) -> dict[str, float]:
        """Return what the shadows hit of what they saw since they were warm, in blocks, by name; counts only rise."""
        found: dict[str, float] = {}
        for name, cache in self._shadows.caches.items():
            found[f"shadow_hits.{name}"] = cache.hits
            found[f"shadow_blocks.{name}"] = cache.blocks
        return found

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Start holding `keys`: the end of a request's use, after which there is time for the shadows."""
        self._policy.insert(keys)
        succession = self._succession
        if succession is not None and succession.is_over:
            self._policy, self._succession = succession.new, None
        uses = self._uses
        uses.note_new(keys)
        if not uses.resting or uses.batches:
            self._follow(min(self._most_steps, max(1, _STEPS_A_BATCH * len(uses.batches) - 1)))

    def _follow(self, num_steps: int) -> None:
        for _ in range(num_steps):
            ended = self._shadows.work()
            if ended is None:
                continue
            self._contest.note(*ended)
            switch = self._contest.decide(self._name)
            if switch is not None and self._may_switch and not self.is_moving:
                self._put_in_charge(switch)

    def _put_in_charge(self, switch: PolicySwitch) -> None:
        self._name = switch.chosen
        self._policy = self._succession = Succession(self._policy, self._kinds[switch.chosen](self.capacity))
        self._shadows.put_in_charge(switch.chosen)
        if self.on_switch is not None:
            self.on_switch(switch)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count one more use of each of `keys`."""
        self._policy.touch(keys)
        self._uses.note_found(keys, self._policy)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`."""
        self._policy.evict(keys)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`; the shadows go on with theirs."""
        self._policy.remove(keys)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield every held key, best victim first, as the policy in charge has it."""
        return self._policy.candidates(incoming)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Put `keys` in tail-first order."""
        self._policy.settle(keys)

    def clear(self) -> None:
        """Forget everything, what the shadows taught included: the first policy is in charge again."""
        self._name = self._first
        self._policy, self._succession = self._kinds[self._first](self.capacity), None
        self._shadows.clear()
        self._shadows.put_in_charge(self._first)
        self._contest.clear()

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, key: object) -> bool:
        return key in self._policy

    def check_invariants(self) -> None:
        """Raise InvariantError if the policy or a shadow contradicts itself."""
        self._policy.check_invariants()
        self._shadows.check_invariants()
        if len(self) > self.capacity:
            raise InvariantError(f"auto holds {len(self)} keys, capacity {self.capacity}")


def with_shadows(name: str, kind: type[EvictionPolicy]) -> Callable[[int], EvictionPolicy]:
    """Return what makes a policy of this kind, for a capacity, with shadows beside it; it stays in charge."""
    if issubclass(kind, ShadowedPolicy):
        return kind
    kinds = {**FOLLOWED, name: kind}

    def make(capacity: int) -> EvictionPolicy:
        return ShadowedPolicy(capacity, name, kinds)

    return make


class AutoPolicy(ShadowedPolicy):
    """The best of the built-in policies for what the cache is used for."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, may_switch=True)
