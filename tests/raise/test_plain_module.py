"""A plain `nn.Module`: token ids in, logits out, torch's own attention, positions that it counts itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elision
from elision.errors import ElisionError


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.before(x)).split(width, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Small(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(Block(32, 4, causal) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_it_generates_like_the_module() -> None:
    source = Small().eval()
    model = elision.compile(source)
    assert set(model.coverage["entries"].values()) == {0} and len(model.program.layers) == 3
    assert model.max_context == 40
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = ids
        assert torch.allclose(model(ids)[0], source(ids), atol=1e-5)
        for _ in range(20):
            want = torch.cat((want, source(want)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=20), want)


def test_skipped_layer() -> None:
    source = Small().eval()
    model = elision.compile(source, passes=["skip-layers:layers=1"])
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    del source.blocks[1]
    assert torch.allclose(model(ids)[0], source(ids), atol=1e-5)


def test_bidirectional_attention_has_no_generation() -> None:
    source = Small(causal=False).eval()
    model = elision.compile(source)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(ids)[0], source(ids), atol=1e-5)
    with pytest.raises(ElisionError, match="no decoder"):
        model.generate(ids)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), "no residual block|no attention"),
        (nn.Linear(3, 3), "token ids"),
        (nn.LSTM(3, 3), "token ids"),
    ],
)
def test_other_modules_are_told(module: nn.Module, says: str) -> None:
    with pytest.raises(ElisionError, match=says):
        elision.compile(module)
