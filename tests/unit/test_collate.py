"""Padded batches: shifted labels, positions, and span pairs that never leave a response."""

import pytest
import torch

from megadistill.data.collate import IGNORE_INDEX, concatenated, left_padded, right_padded

SEQUENCES = [((5, 6, 7), (8, 9)), ((1,), (2, 3, 4, 0)), ((4, 4), None), ((3, 3, 3), ())]


def test_right_padded_by_hand():
    batch = right_padded([((5, 6, 7), (8, 9)), ((1,), (2,))], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    no = IGNORE_INDEX
    assert batch.labels.tolist() == [[no, no, 8, 9, no], [2, no, no, no, no]]
    assert all(tensor.dtype == torch.int64 for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor))
    assert batch.lengths == (5, 2) and batch.starts == [0, 5] and batch.bounds is None


def test_concatenated_by_hand():
    batch = concatenated([((5, 6, 7), (8, 9)), ((1,), None), ((1,), (2,))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1]]
    no = IGNORE_INDEX
    assert batch.labels.tolist() == [[no, no, 8, 9, no, no, 2, no]]
    assert batch.lengths == (5, 1, 2) and batch.starts == [0, 5, 6]
    assert batch.bounds is not None and batch.bounds.tolist() == [0, 5, 6, 8]


def test_labels_are_the_next_input_token_on_response_positions_only():
    batch = right_padded(SEQUENCES, pad_id=9)
    width = batch.input_ids.shape[1]
    assert width == 5
    for row, (prompt, response) in enumerate(SEQUENCES):
        start, length = len(prompt), len(response or ())
        assert batch.input_ids[row, start : start + length].tolist() == list(response or ())
        assert int(batch.attention_mask[row].sum()) == start + length
        for i in range(width):
            inside = start - 1 <= i <= start + length - 2
            expected = int(batch.input_ids[row, i + 1]) if inside else IGNORE_INDEX
            assert int(batch.labels[row, i]) == expected


def test_a_pad_id_that_is_also_a_token_stays_a_label():
    """EOS often serves as padding: the EOS of the response must be learned, the padding must not."""
    batch = right_padded([((1,), (2, 7)), ((1, 1, 1), (2, 7))], pad_id=7)
    assert batch.labels.tolist()[0] == [2, 7, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]


def test_left_padded():
    batch = left_padded([(1, 2, 3), (4,)], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]


def test_a_sequence_without_prompt_is_a_defect():
    with pytest.raises(AssertionError):
        right_padded([((), (1,))], pad_id=0)
    with pytest.raises(AssertionError):
        concatenated([((), (1,))])
    with pytest.raises(AssertionError):
        left_padded([()], pad_id=0)
