"""Row ids of verl's batches: a token of a sequence has the same id wherever a batch puts it."""

import torch

from roundoff.hardware import POSITIONS
from roundoff.plugins.verl.rows import packed_rows, padded_rows, real_tokens, sequence_id

A, B = torch.tensor([5, 6, 7]), torch.tensor([5, 6, 7, 8, 9])


def test_rows_depend_on_the_sequence_and_the_position_alone():
    together, alone, packed = padded_rows([A, B]), padded_rows([A]), packed_rows([B, A])
    assert together.shape == (2, 5)
    assert packed.shape == (1, 8)
    torch.testing.assert_close(together[0, :3], alone[0], rtol=0, atol=0)
    torch.testing.assert_close(packed[0], torch.cat([together[1], together[0, :3]]), rtol=0, atol=0)


def test_rows_are_those_of_the_convention():
    assert real_tokens([A, B]).sum(1).tolist() == [len(A), len(B)] and bool(real_tokens([A, B])[0, 0])
    assert padded_rows([A])[0].tolist() == [sequence_id(A) * POSITIONS + t for t in range(3)]
    assert 0 <= sequence_id(A) < 2**43


def test_every_token_of_a_sequence_counts():
    assert sequence_id(A) != sequence_id(B)
    assert sequence_id(A) != sequence_id(torch.tensor([5, 6, 8]))
    assert sequence_id(A) == sequence_id(A.to(torch.int32))
