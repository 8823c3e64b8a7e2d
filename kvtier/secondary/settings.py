"""Settings of a tier over a store: threads, deadlines, back-pressure, and pauses after failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtier.errors import ConfigError
from kvtier.executors.base import CALL_BYTES


@dataclass(frozen=True)
class Deadlines:
    """Deadlines of a tier, in seconds.

    Attributes:
        job: longest time without any progress while there are jobs, and for an executor to end when told to.
        overtaken_job: longest time without progress of a job that later ones have overtaken. A job that is not
            overtaken may just be waiting for its turn.
        start: longest time without any progress while a store opens.
        drain: how long `drain_jobs` and `shutdown` wait for running jobs.
        kill: how long they wait for a killed executor to end.
    """

    job: float = 10.0
    overtaken_job: float = 40.0
    start: float = 60.0
    drain: float = 2.0
    kill: float = 1.0


@dataclass(frozen=True)
class TierSettings:
    """Settings of a tier over a store.

    Attributes:
        threads: parallel calls of the store.
        call_bytes: most payload bytes that one of them moves, unless one block is larger.
        deadlines: in seconds.
        most_store_bytes: most payload bytes of store jobs in flight; beyond that, `can_store` returns False.
        failures_to_open, first_backoff, longest_backoff: of the breaker.
        environment_secrets: prefixes of environment variables with credentials that the store's client reads by itself,
            such as "AWS_". The I/O process gets only these secrets, and those that an option names.
    """

    threads: int = 4
    call_bytes: int = CALL_BYTES
    deadlines: Deadlines = field(default_factory=Deadlines)
    most_store_bytes: int = 256 << 20
    failures_to_open: int = 3
    first_backoff: float = 0.5
    longest_backoff: float = 30.0
    environment_secrets: tuple[str, ...] = ()

    @classmethod
    def checked(cls, threads: int, job_deadline: float) -> TierSettings:
        """Return settings with the two values that users configure.

        Raises:
            ConfigError: a value is out of range; the error names the key.
        """
        if not (isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= 64):
            raise ConfigError("threads", threads, "an int, 1 to 64")
        if isinstance(job_deadline, bool) or not isinstance(job_deadline, int | float) or not 0 < job_deadline < 3600:
            raise ConfigError("job_deadline", job_deadline, "seconds, above 0 and below 3600")
        drain = min(Deadlines.drain, float(job_deadline))
        return cls(threads=threads, deadlines=Deadlines(job_deadline, 4 * job_deadline, drain=drain))
