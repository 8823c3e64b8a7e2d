"""What counts as a use of a block under vLLM's scheduler."""

import random
from collections import Counter

from scheduler_driver import BLOCK, DEVICE_BLOCKS, Driver, kvtier_manager


def test_a_request_uses_its_blocks_once_however_often_it_is_preempted(model):
    manager = kvtier_manager(eviction_policy="arc")
    driver = Driver(model, manager, with_window=False)
    uses, preempted = Counter(), Counter()
    table, end_step = manager._core.manager._table, manager.on_schedule_end
    policy, touch = table.policy, table.policy.touch

    def count_uses(keys, *when):
        uses.update(key for key in keys if key in table.slot_of)  # a policy ignores others; vLLM 0.30 names them
        touch(keys, *when)

    def count_preempted(context):
        preempted.update(context.preempted_req_ids)
        end_step(context)

    policy.touch, manager.on_schedule_end = count_uses, count_preempted
    rng = random.Random(0)
    length = DEVICE_BLOCKS // 3 * BLOCK  # three prompts fill the device, and their answers find no place
    driver.run([[rng.randrange(3, 500) for _ in range(length)] for _ in range(12)])
    manager.shutdown()
    assert preempted
    assert not uses, "no request has used what another one stored"
