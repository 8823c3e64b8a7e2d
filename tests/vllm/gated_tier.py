"""A tier out of the tree that really holds blocks, and answers when a test lets it; named by `module_path`."""

import os
from pathlib import Path

from kvtier.secondary.example import ExampleSecondaryTierManager


class GatedTier(ExampleSecondaryTierManager):
    """Begins no job and answers none while the file that the environment names is there."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._waiting = []
        self._gate = Path(os.environ["KVTIER_TEST_GATE"])

    def submit_store(self, job_metadata):
        self._waiting.append((super().submit_store, job_metadata))

    def submit_load(self, job_metadata):
        self._waiting.append((super().submit_load, job_metadata))

    def get_finished_jobs(self):
        if not self._gate.exists():
            waiting, self._waiting = self._waiting, []
            for submit, job_metadata in waiting:
                submit(job_metadata)
        return super().get_finished_jobs()
