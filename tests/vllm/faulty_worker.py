"""Methods that vLLM adds to its workers (`worker_extension_cls`): a test breaks copies with them."""

from vllm.distributed.kv_transfer import get_kv_transfer_group

GARBAGE = 0x41


class FaultyWorker:
    """Extends vLLM's worker, whose rank is `self.rank`."""

    def break_loads(self, times, rank=0):
        """Let the next copies to the device fail on one rank, after they have left garbage there."""
        if self.rank != rank:
            return
        worker = get_kv_transfer_group().connector_worker.worker._attached.worker
        whole, left = type(worker)._copy, times

        def copy(plan, to_slots):
            nonlocal left
            if to_slots or not left:
                return whole(worker, plan, to_slots)
            left -= 1
            for group_idx, runs in plan.groups:
                for _, rows in worker._pages[group_idx]:
                    for block, _, _, length in runs:
                        rows[block : block + length] = GARBAGE
            raise ValueError("a test breaks this copy")

        worker._copy = copy
