"""A device whose copies take time: a copy that is submitted reads and writes its bytes up to two steps later."""

from collections import deque

MOST_STEPS = 2
"""kvtier takes a transfer that starts four steps after a later one for given up, and vLLM defers stores by a step."""


class LateCopies:
    """Wraps an offloading worker. Copies keep their order; who waits for one gets it at once."""

    def __init__(self, worker, rng):
        self._worker, self._rng = worker, rng
        self._waiting = deque()
        self._step = 0

    def submit_store(self, job_id, *specs):
        return self._put(self._worker.submit_store, job_id, specs)

    def submit_load(self, job_id, *specs):
        return self._put(self._worker.submit_load, job_id, specs)

    def get_finished(self):
        self._step += 1
        while self._waiting and self._waiting[0][0] <= self._step:
            self._copy_next()
        return self._worker.get_finished()

    def wait(self, job_ids):
        while any(job_id in job_ids for _, _, job_id, _ in self._waiting):
            self._copy_next()
        self._worker.wait(job_ids)

    def __getattr__(self, name):
        return getattr(self._worker, name)

    def _put(self, submit, job_id, specs):
        self._waiting.append((self._step + self._rng.randint(0, MOST_STEPS), submit, job_id, specs))
        return True

    def _copy_next(self):
        _, submit, job_id, specs = self._waiting.popleft()
        assert submit(job_id, *specs)
