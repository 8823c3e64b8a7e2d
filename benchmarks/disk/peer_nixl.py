"""NIXL's POSIX backend: it moves memory to places in a file, and keeps neither keys nor checksums."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from nixl_cu12._api import nixl_agent, nixl_agent_config
from peer import Peer, PeerPlace, reserve_file

from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, JobResult, ScheduleEndContext

_NAME = "benchmark"


class NIXLPeer(Peer):
    """A transfer per job, at the file's offset that belongs to the slot."""

    def __init__(self, place: PeerPlace) -> None:
        self.tier, self.block_bytes, self._address = self, place.block_bytes, place.address
        path, num_bytes = place.folder / "slots", place.num_blocks * place.block_bytes
        reserve_file(path, num_bytes)
        self._descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._agent = nixl_agent(_NAME, nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", {})
        self._agent.register_memory([(self._address, num_bytes, 0, "")], "DRAM", backends=["POSIX"])
        self._agent.register_memory([(0, num_bytes, self._descriptor, "slots")], "FILE", backends=["POSIX"])
        self._running: dict[int, Any] = {}

    def can_store(self, num_blocks: int) -> bool:
        return True

    def submit_store(self, job: JobMetadata) -> None:
        self._submit("WRITE", job)

    def submit_load(self, job: JobMetadata) -> None:
        self._submit("READ", job)

    def _submit(self, direction: str, job: JobMetadata) -> None:
        size, offsets = self.block_bytes, [slot * self.block_bytes for slot in job.block_ids.tolist()]
        memory = self._agent.get_xfer_descs([(self._address + offset, size, 0) for offset in offsets], "DRAM")
        file = self._agent.get_xfer_descs([(offset, size, self._descriptor) for offset in offsets], "FILE")
        transfer = self._agent.initialize_xfer(direction, memory, file, _NAME, b"", ["POSIX"])
        self._agent.transfer(transfer)
        self._running[job.job_id] = transfer

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job_id, transfer in list(self._running.items()):
            state = self._agent.check_xfer_state(transfer)
            if state in ("DONE", "ERR"):
                self._running.pop(job_id).release()
                yield JobResult(job_id, state == "DONE")

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Do nothing: an agent has no steps."""

    def forget(self, keys: Sequence[OffloadKey]) -> None:
        """Do nothing: there are no keys, and the next round writes to the same places."""

    def close(self) -> None:
        for transfer in self._running.values():
            transfer.release()
        os.close(self._descriptor)
