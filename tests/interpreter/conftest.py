"""Nothing in Triton's interpreter may return memory that no kernel has written."""

import pytest
import torch


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Torch fills what `torch.empty` and its kin return with NaN when asked to be deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def empty_is_anything(empty_is_nan):
    """For torch's own checks of an operator, which compare strides and memory their own way."""
    torch.use_deterministic_algorithms(False)
