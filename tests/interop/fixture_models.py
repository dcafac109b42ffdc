"""Parts that the scripts of the fixtures share; they need PyTorch alone."""

import string

import torch

VOCAB = [
    *['[PAD]', '[unused0]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
    *string.ascii_lowercase,
    *[f'##{c}' for c in string.ascii_lowercase],
    *['the', 'of', 'is', 'who', 'red', 'cat'],
]


def randomize(
    model: torch.nn.Module, seed: int, width: int | None = None
) -> torch.nn.Module:
  """Draws weights so large that a wrong activation, epsilon or name shows.

  Sums over `width` are of the order of 1.5 at any width; None: over the last
  dimension of each matrix.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in sorted(model.named_parameters()):
      noise = torch.randn(p.shape, generator=generator)
      noise *= 0.3 if p.dim() == 1 else 1.5 / (width or p.shape[-1]) ** 0.5
      is_norm = 'norm' in name.lower() and name.endswith('weight')
      p.copy_(1 + noise if is_norm else noise)
  return model.eval()
