"""What every test in Triton's interpreter needs: a numpy that it works with, and no memory that only looks written."""

import numpy as np
import pytest
import torch
import triton


def pytest_configure():
    version = lambda text: tuple(int(part) for part in text.split(".")[:2])
    if version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4):
        raise pytest.UsageError(
            f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}: run  "
            'pip install "numpy<2.4"  or take triton 3.7'
        )


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
