"""A model that is loaded onto a GPU has the bits of the files, and of the cast that the CPU makes."""

import pytest
import torch

from solar import tensorfile
from solar.checkpoint import load_model
from tests.golden import tiny
from tests.test_checkpoint import LAYOUTS, same, tensors_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; `make test-gpu` where there is one")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["shards", "release"])
def test_on_a_gpu_there_are_the_same_bits(layout, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 250)  # many pieces, by several threads
    tensors = tensors_of("mistral_window", "float16")
    LAYOUTS[layout](tmp_path, tiny.CASES["mistral_window"], tensors)
    model = load_model(tmp_path, dtype=dtype, device="cuda")
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    assert same({name: tensor.cpu() for name, tensor in model.state_dict().items()}, expected)
