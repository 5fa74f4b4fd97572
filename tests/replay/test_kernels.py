"""Kernels are switched as they were in the training, and back."""

import pytest
import torch
from torch.nn import functional

from lightning_dtda.replay.kernels import drops_out_inside, enabled_kernels, using_kernels


@pytest.mark.parametrize("names", [[], ["cudnn"], ["flash_attention", "fused_encoder_layers"]])
def test_exactly_the_named_ones_are_used(names):
    before = enabled_kernels()
    with using_kernels(names):
        assert enabled_kernels() == names
        assert torch.backends.cudnn.enabled == ("cudnn" in names)
        assert torch.backends.cuda.flash_sdp_enabled() == ("flash_attention" in names)
    assert enabled_kernels() == before


def test_they_are_switched_back_after_an_error():
    before = enabled_kernels()
    with pytest.raises(ValueError, match="inside"), using_kernels([]):
        raise ValueError("inside")
    assert enabled_kernels() == before


def test_dropout_of_its_own_is_inside_no_kernel():
    x = torch.randn(2, 2, 8, 4, requires_grad=True)
    attention = functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert drops_out_inside(functional.dropout(attention).sum()) is None
