"""The rank pool: results by rank, errors with their traceback, alive again afterwards."""

import pytest

from tests.support.rank_functions import fail_on, rank_sum
from tests.support.rank_pool import RankError, RankPool


def test_a_failing_rank_is_reported_and_the_pool_recovers() -> None:
    pool = RankPool(2)
    assert pool.run(rank_sum, 3) == [3, 3]
    with pytest.raises(RankError, match="planted"):
        pool.run(fail_on, 1)
    assert pool.run(rank_sum, 5) == [5, 5]
    pool.close()
