import pytest

from .ranks import Ranks


@pytest.fixture(scope="session")
def _pools(tmp_path_factory):
    pools = {}

    def pool(size):
        if size not in pools or not pools[size].alive:
            pools[size] = Ranks(size, str(tmp_path_factory.mktemp("ranks") / "store"))
        return pools[size]

    yield pool
    for ranks in pools.values():
        ranks.stop()


@pytest.fixture
def two_ranks(_pools):
    return _pools(2)


@pytest.fixture
def four_ranks(_pools):
    return _pools(4)
