"""Write torch_reference.safetensors: layers of torch with what they make of an input.

The tests read the file; torch is needed to write it only, in an environment of its own:

  python -m venv /tmp/torch && /tmp/torch/bin/pip install torch numpy safetensors
  /tmp/torch/bin/python tests/io/write_torch_reference.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm


class Projections(nn.Module):
  """Attention with separate projections and fewer heads of keys, as in Llama."""

  def __init__(self, features, heads, kv_heads):
    super().__init__()
    size = features // heads
    self.heads, self.kv_heads = heads, kv_heads
    self.q_proj = nn.Linear(features, features)
    self.k_proj = nn.Linear(features, kv_heads * size)
    self.v_proj = nn.Linear(features, kv_heads * size)
    self.o_proj = nn.Linear(features, features, bias=False)

  def forward(self, x):
    heads = lambda y, n: y.unflatten(-1, (n, -1)).transpose(1, 2)
    q = heads(self.q_proj(x), self.heads)
    k, v = (heads(f(x), self.kv_heads) for f in (self.k_proj, self.v_proj))
    k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.o_proj(y.transpose(1, 2).flatten(2))


class Conv1D(nn.Module):
  """The linear layer of GPT-2: `[in, out]`."""

  def __init__(self, inputs, outputs):
    super().__init__()
    self.weight = nn.Parameter(torch.randn(inputs, outputs))
    self.bias = nn.Parameter(torch.randn(outputs))

  def forward(self, x):
    return x @ self.weight + self.bias


class Fused(nn.Module):
  """The attention of GPT-2, one map for queries, keys and values."""

  def __init__(self, features, heads):
    super().__init__()
    self.heads = heads
    self.c_attn, self.c_proj = Conv1D(features, 3 * features), Conv1D(features, features)

  def forward(self, x):
    q, k, v = (
      y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1)
    )
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.c_proj(y.transpose(1, 2).flatten(2))


class MultiheadAttention(nn.MultiheadAttention):
  """Self-attention, or attention to a context of other features."""

  def forward(self, x):
    context = x if self.kdim == self.embed_dim else torch.cat([x, x], -1)[..., : self.kdim]
    return super().forward(x, context, context, need_weights=False)[0]


LAYERS = {
  "linear": (lambda: nn.Linear(4, 4), (3, 4)),
  "linear_wide": (lambda: nn.Linear(3, 5, bias=False), (2, 3)),
  "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
  "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2), (2, 4, 7, 8)),
  "conv2d_square": (lambda: nn.Conv2d(3, 3, 3), (2, 3, 5, 5)),
  "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), bias=False), (1, 2, 3, 4, 5)),
  "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5)),
  "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 3, (3, 2), stride=2), (2, 3, 4, 5)),
  "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 3, 3, 2)),
  "batch_norm": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
  "layer_norm": (lambda: nn.LayerNorm(6, eps=1e-6), (2, 6)),
  "rms_norm": (lambda: nn.RMSNorm(6, eps=1e-6), (2, 6)),
  "group_norm": (lambda: nn.GroupNorm(2, 6, eps=1e-6), (2, 6, 5)),
  "instance_norm": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 5)),
  "embedding": (lambda: nn.Embedding(5, 5), (2, 3)),
  "prelu": (lambda: nn.PReLU(), (4,)),
  "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 5)), (2, 3)),
  "weight_norm_conv": (lambda: old_weight_norm(nn.Conv1d(3, 3, 3)), (2, 3, 6)),
  "attention": (lambda: MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
  "attention_context": (
    lambda: MultiheadAttention(6, 2, kdim=8, vdim=8, batch_first=True),
    (2, 3, 6),
  ),
  "projections": (lambda: Projections(8, 4, 2), (2, 3, 8)),
  "fused": (lambda: Fused(8, 2), (2, 3, 8)),
}


def main():
  torch.manual_seed(0)
  tensors = {}
  for name, (make, shape) in LAYERS.items():
    layer = make().eval()
    for x in [*layer.parameters(), *layer.buffers()]:
      if x.is_floating_point():  # no bias is 0, no scale is 1
        x.data.uniform_(0.2, 1.0) if "norm" in name else x.data.normal_()
    x = torch.randint(0, 5, shape) if name == "embedding" else torch.randn(shape)
    with torch.no_grad():
      y = layer(x)
    tensors |= {f"{name}/in": x, f"{name}/out": y.contiguous()}
    tensors |= {f"{name}/{key}": v.detach().clone() for key, v in layer.state_dict().items()}
  save_file(tensors, Path(__file__).with_name("torch_reference.safetensors"))


if __name__ == "__main__":
  main()
