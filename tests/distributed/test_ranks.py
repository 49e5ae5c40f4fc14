"""The harness itself: a failure on one rank is a failure of the test, with its traceback."""

import pytest
import torch
import torch.distributed as dist


def _one_fails_while_the_other_waits():
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.all_reduce(torch.ones(1))


def _sums():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()


def test_a_failing_rank_fails_the_test_with_its_traceback(two_ranks):
    with pytest.raises(AssertionError, match=r"rank 1: (?s:.*)_one_fails(?s:.*)the cause"):
        two_ranks.run(_one_fails_while_the_other_waits)
    assert not two_ranks.alive


def test_ranks_start_anew_after_a_failure(two_ranks):
    two_ranks.run(_sums)
