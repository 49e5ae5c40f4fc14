import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("test", max_examples=60, deadline=None)
settings.register_profile("nightly", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
