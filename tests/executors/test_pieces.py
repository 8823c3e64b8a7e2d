"""Pieces are ranges of a part: together they are the part, block by block."""

import pytest

from kvtier.executors.pieces import arena_slots, cut
from kvtier.executors.protocol import Part


@pytest.mark.parametrize("max_blocks", [1, 3, 7, 10])
def test_a_part_is_cut_into_pieces_that_hold_its_blocks_in_their_order(max_blocks):
    keys, slots = [bytes([number]) * 36 for number in range(7)], list(range(10, 17))
    for store_slots in (None, list(range(20, 27))):
        pieces = cut(Part.of(5, 2, True, keys, slots, store_slots), max_blocks)
        assert all(piece.num_blocks <= max_blocks and piece.serial == 5 and piece.is_load for piece in pieces)
        assert [piece.first for piece in pieces] == list(range(2, 9, max_blocks))
        assert [key for piece in pieces for key in piece.keys] == keys
        assert list(arena_slots(pieces)) == slots == [slot for piece in pieces for slot in piece.arena_slots]
        assert [slot for piece in pieces for slot in piece.store_slots or ()] == (store_slots or [])
        assert all(piece.has_store_slots is (store_slots is not None) for piece in pieces)
