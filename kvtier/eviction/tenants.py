"""Quotas: no tenant holds more than its share of a tier while other tenants want theirs.

Each tenant has a policy of its own. Shares are equal; a tenant without a request for some minutes has no share. Blocks
beyond a tenant's share are evicted first, retained ones last among them. A block is charged to the tenant that stored
it, whoever uses it. The retained blocks of all tenants together hold no more than those of one policy may.

Its weakness: a policy that learns starts again for every tenant, and for one that comes back after its blocks are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from kvtier.errors import InvariantError
from kvtier.eviction.retention import MAX_ENDED, RetentionPolicy, ServedPolicy
from kvtier.hints import NO_HINT, Hint
from kvtier.key_tables import KeyDict, key_dict
from kvtier.keys import OffloadKey

IDLE_SECONDS = 600.0
"""A tenant without a request for this long has no share."""
MAX_TENANTS = 256
"""Most accounts. Clients may invent names, so further names share the account of requests without a tenant."""
_NOBODY = ""


class TenantPolicy(ServedPolicy):
    """The policies of all tenants as one policy; call `serve` before the calls for a request."""

    def __init__(self, first: RetentionPolicy, make: Callable[[], RetentionPolicy]) -> None:
        """Args:
        first: the policy for requests without a tenant; may hold keys already.
        make: returns an empty policy of the same capacity.
        """
        super().__init__(first.capacity)
        self._make = make
        self._first, self._most_kept = first, first.most_kept
        self._policies: dict[str, RetentionPolicy] = {_NOBODY: first}
        self._owner_of: KeyDict[str] = key_dict(first.capacity)
        """The tenants of all blocks but those of `_first`, which may hold very many blocks already."""
        self._last_request: dict[str, float] = {}
        self._tenant, self._request, self._now = _NOBODY, "", 0.0
        self._release_at = 0.0
        """Before this time no policy has a block to release: times end with whole seconds."""

    @property
    def num_kept(self) -> int:
        return sum(policy.num_kept for policy in self._policies.values())

    def num_held(self, tenant: str) -> int:
        """Return how many blocks are charged to a tenant."""
        return len(self._policies.get(tenant, ()))

    def serve(self, hint: Hint, request: str, now: float) -> None:
        if now >= self._release_at:
            self._release(now)
        self._tenant = self._account(hint.tenant or _NOBODY)
        self._request, self._now = request, now
        self._last_request[self._tenant] = now
        policy = self._policies[self._tenant]
        policy.begin(hint, request, now)
        if hint.retain is not None:
            policy.most_kept = self._most_kept - (self.num_kept - policy.num_kept)

    def _release(self, now: float) -> None:
        """Release blocks whose time or session is over; whose turn it is when `MAX_ENDED` are released comes last in
        the next call.
        """
        num_left = MAX_ENDED
        for tenant, policy in self._policies.items():
            num_left -= policy.release(now, num_left)
            if not num_left:
                self._policies[tenant] = self._policies.pop(tenant)
                return
        self._release_at = int(now) + 1

    def _account(self, tenant: str) -> str:
        if tenant in self._policies:
            return tenant
        if len(self._policies) >= MAX_TENANTS:
            empty = next((name for name, policy in self._policies.items() if name and not len(policy)), None)
            if empty is None:
                return _NOBODY
            del self._policies[empty]
            self._last_request.pop(empty, None)
        self._policies[tenant] = self._make()
        return tenant

    # -- uses ---------------------------------------------------------------------------------------------

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Hold `keys` and charge them to the request's tenant."""
        if self._tenant != _NOBODY:
            self._owner_of.set_all(keys, [self._tenant] * len(keys))
        self._policies[self._tenant].insert(keys, now)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count one more use of each of `keys`. The request's hint applies to its own tenant's blocks only."""
        if not keys:
            self._policies[self._tenant].touch(keys, now)
        for policy, theirs in self._by_account(keys):
            policy.touch(theirs, now)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Order `keys` by recency, each in the policy of its tenant."""
        for policy, theirs in self._by_account(keys, always=True):
            policy.settle(theirs)
        self._release_at = 0.0  # a session may have ended

    def line_up(self, keys: Sequence[OffloadKey]) -> None:
        """Order `keys` of a request that goes on, each in the policy of its tenant."""
        for policy, theirs in self._by_account(keys):
            policy.line_up(theirs)

    def _by_account(
        self, keys: Sequence[OffloadKey], always: bool = False
    ) -> Iterator[tuple[RetentionPolicy, list[OffloadKey]]]:
        """Yield the policies that hold some of `keys`, each with those keys.

        Other tenants' policies are told that the request has no hint.

        Args:
            always: yield the policy of the request's tenant even if it holds none of `keys`.
        """
        theirs: dict[str, list[OffloadKey]] = {self._tenant: []} if always else {}
        for key in keys:
            owner = self._owner_of.get(key)
            if owner is None and key in self._first:
                owner = _NOBODY
            if owner is not None:
                theirs.setdefault(owner, []).append(key)
        for owner, some in theirs.items():
            policy = self._policies[owner]
            if owner != self._tenant:
                policy.begin(NO_HINT, self._request, self._now)
            yield policy, some

    # -- victims ------------------------------------------------------------------------------------------

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield what other tenants hold beyond their shares, largest excess first, then the own tenant's blocks.

        Without `incoming`, yield all held keys, tenant by tenant. Retained blocks are victims only beyond a share.
        """
        if not incoming:
            for policy in self._policies.values():
                policy.num_evictable = self.num_evictable
                yield from policy.candidates()
            return
        for tenant, excess in self._excesses(len(incoming)):
            if tenant != self._tenant:
                self._policies[tenant].num_evictable = self.num_evictable
                yield from islice(self._policies[tenant].candidates(), excess)  # retained ones last
        own = self._policies[self._tenant]
        own.may_decline, own.num_evictable = self.may_decline, self.num_evictable
        yield from own.candidates(incoming)

    def _excesses(self, num_incoming: int) -> list[tuple[str, int]]:
        """Return the tenants that hold more than their share, each with its excess in blocks, largest first.

        The request's tenant is taken to hold the incoming blocks already.
        """
        since = self._now - IDLE_SECONDS
        active = {tenant for tenant, last in self._last_request.items() if last > since}
        share = self.capacity // max(1, len(active))
        held = {tenant: len(policy) for tenant, policy in self._policies.items()}
        held[self._tenant] += num_incoming
        beyond = [(tenant, count - (share if tenant in active else 0)) for tenant, count in held.items()]
        return sorted([one for one in beyond if one[1] > 0], key=lambda one: -one[1])

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        for policy, theirs in self._by_account(keys):
            policy.evict(theirs)
            if not len(policy) and policy is not self._policies[self._tenant]:
                policy.clear()  # a policy remembers evicted blocks, and those of tenants that went away would add up
        self._forget(keys)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        for policy, theirs in self._by_account(keys):
            policy.remove(theirs)
        self._forget(keys)

    def _forget(self, keys: Sequence[OffloadKey]) -> None:
        for key in keys:
            self._owner_of.pop(key, None)

    def clear(self) -> None:
        self._owner_of.clear()
        for policy in self._policies.values():
            policy.clear()

    def __len__(self) -> int:
        return len(self._owner_of) + len(self._first)

    def __contains__(self, key: object) -> bool:
        return key in self._owner_of or key in self._first

    def check_invariants(self) -> None:
        """Raise InvariantError if accounts and policies differ, or a policy contradicts itself."""
        for policy in self._policies.values():
            policy.check_invariants()
        if sum(map(len, self._policies.values())) != len(self):
            raise InvariantError("accounts and policies differ in number")
        if self.num_kept > self._most_kept:
            raise InvariantError(f"{self.num_kept} blocks are kept, {self._most_kept} may be")
        if any(key not in self._policies[owner] for key, owner in self._owner_of.items()):
            raise InvariantError("a block is on the account of a tenant whose policy does not hold it")
