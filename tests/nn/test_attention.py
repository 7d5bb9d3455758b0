import pytest
import torch
from torch.nn.functional import softmax

from gspn.nn import SelfAttention2d


@pytest.mark.parametrize(("dim", "head_dim", "expected"), [(96, 64, 48), (128, 64, 64), (7, 64, 7), (10, 3, 2)])
def test_heads_divide_the_channels(dim, head_dim, expected):
    assert SelfAttention2d(dim, head_dim=head_dim).head_dim == expected


def test_attention_by_the_formula():
    torch.manual_seed(0)
    module = SelfAttention2d(6, head_dim=3).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    q, k, v = module.qkv(x).flatten(2).chunk(3, dim=1)  # [B, C, N]
    expected = torch.empty(2, 6, 15, dtype=torch.float64)
    for head in range(2):
        own = slice(3 * head, 3 * head + 3)
        weights = softmax(q[:, own].transpose(1, 2) @ k[:, own] / 3**0.5, dim=-1)  # [B, N, N]
        expected[:, own] = v[:, own] @ weights.transpose(1, 2)
    torch.testing.assert_close(module(x), expected.view_as(x))


def test_it_has_no_positions():
    torch.manual_seed(0)
    module, x = SelfAttention2d(8), torch.randn(1, 8, 4, 6)
    torch.testing.assert_close(module(x.flip(3)), module(x).flip(3))


def test_options_are_checked():
    with pytest.raises(ValueError, match="head_dim=0"):
        SelfAttention2d(8, head_dim=0)
