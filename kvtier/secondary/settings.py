"""How a tier over a store behaves: threads, deadlines, back-pressure, and the pauses after failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtier.errors import ConfigError


@dataclass(frozen=True)
class Deadlines:
    """How long is too long, in seconds.

    Attributes:
        job: without any progress while jobs are open, and for an executor to end when told to.
        overtaken_job: without progress of a job that later ones have overtaken; one that waits its turn is not late.
        start: without any progress while a store opens.
        drain: for `drain_jobs` and `shutdown` to let running jobs end by themselves.
        kill: for a killed executor to be gone, while somebody waits for it.
    """

    job: float = 10.0
    overtaken_job: float = 40.0
    start: float = 60.0
    drain: float = 2.0
    kill: float = 1.0


@dataclass(frozen=True)
class TierSettings:
    """How a tier over a store behaves.

    Attributes:
        threads: calls into the store at the same time.
        deadlines: in seconds.
        most_store_bytes: payload of store jobs in flight; more is back-pressure.
        failures_to_open, first_backoff, longest_backoff: of the breaker.
        environment_secrets: how the names of secret environment variables begin that the store's client reads by
            itself, such as "AWS_". Its I/O process gets no other secrets than these and those that an option names.
    """

    threads: int = 4
    deadlines: Deadlines = field(default_factory=Deadlines)
    most_store_bytes: int = 256 << 20
    failures_to_open: int = 3
    first_backoff: float = 0.5
    longest_backoff: float = 30.0
    environment_secrets: tuple[str, ...] = ()

    @classmethod
    def checked(cls, threads: int, job_deadline: float) -> TierSettings:
        """Return settings from the two values that users configure.

        Raises:
            ConfigError: out of range; the error names the key.
        """
        if not (isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= 64):
            raise ConfigError("threads", threads, "an int, 1 to 64")
        if isinstance(job_deadline, bool) or not isinstance(job_deadline, int | float) or not 0 < job_deadline < 3600:
            raise ConfigError("job_deadline", job_deadline, "seconds, above 0 and below 3600")
        drain = min(Deadlines.drain, float(job_deadline))
        return cls(threads=threads, deadlines=Deadlines(job_deadline, 4 * job_deadline, drain=drain))
