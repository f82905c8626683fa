"""Soft prompts: embeddings that stand before a prompt, as positions with ids beyond the vocabulary.

So everything that counts, sorts, shares or truncates tokens treats them like any other.
Source: Lester et al. 2021, arXiv 2104.08691.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from pipeline.errors import AdapterError
from pipeline.package import ExpertPackage
from pipeline.package.pickled_prompt import PICKLE_SUFFIXES, read_pickled_prompt


class SoftPrompts:
    """The soft prompts of one engine.

    Args:
        vocab_size: Ids from here on are theirs.
        hidden_size: Numbers in an embedding.
        device, dtype: Of the model.
    """

    def __init__(self, vocab_size: int, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._table = torch.empty((0, hidden_size), device=device, dtype=dtype)
        self._known: dict[bytes, tuple[int, ...]] = {}

    def add(self, embeddings: torch.Tensor) -> tuple[int, ...]:
        """Make a soft prompt known.

        Args:
            embeddings: [num_positions, hidden_size]

        Returns:
            The ids to put before a prompt's own. The same embeddings have the same ids.

        Raises:
            AdapterError: The shape is another, or a value is not finite.
        """
        fits = embeddings.ndim == 2 and embeddings.shape[1] == self._hidden_size and embeddings.shape[0] > 0
        if not fits or not embeddings.isfinite().all():
            raise AdapterError(
                f"a soft prompt of shape {list(embeddings.shape)} cannot be used",
                hint=f"It needs finite embeddings of shape [positions, {self._hidden_size}], as the base model has.",
            )
        key = blake2b(embeddings.float().cpu().contiguous().numpy().tobytes()).digest()
        if key not in self._known:
            first = self.vocab_size + len(self._table)
            self._table = torch.cat([self._table, embeddings.to(self._table)])
            self._known[key] = tuple(range(first, first + len(embeddings)))
        return self._known[key]

    def is_known(self, token_ids: Sequence[int]) -> bool:
        """Whether every id is a token's or a soft prompt's."""
        return max(token_ids, default=0) < self.vocab_size + len(self._table)

    def embed(self, token_ids: torch.Tensor, embedding: torch.nn.Module) -> torch.Tensor:
        """The embeddings of tokens, soft ones among them: [1, num_tokens] to [1, num_tokens, hidden_size]."""
        is_soft = token_ids >= self.vocab_size
        embedded: torch.Tensor = embedding(token_ids.masked_fill(is_soft, 0)).clone()
        embedded[is_soft] = self._table[token_ids[is_soft] - self.vocab_size]
        return embedded


def load_soft_prompts(package: ExpertPackage) -> dict[str, torch.Tensor]:
    """Read the soft prompts of a package, `[num_positions, hidden_size]` each, by name.

    Raises:
        AdapterError: One is not a file with one tensor of as many positions as the manifest says. PyTorch's files are
            pickles: another process reads them, with bounds, and gives back the tensor alone.
    """
    return {
        prompt.name: _load(package, prompt.name, prompt.path, prompt.tokens) for prompt in package.manifest.soft_prompts
    }


def _load(package: ExpertPackage, name: str, path: str, num_positions: int) -> torch.Tensor:
    hint = 'Save the tensor with safetensors.torch.save_file({"prompt": tensor}, path) and pack the expert again.'
    try:
        if path.endswith(PICKLE_SUFFIXES):
            data = read_pickled_prompt(package.root / path, num_positions, source=package.label)
            return load(data)["prompt"]
        tensors = list(load_file(package.root / path).values())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"soft prompt {name!r} of {package.label} cannot be read", details=(str(error),), hint=hint
        ) from error
    shapes = [list(tensor.shape) for tensor in tensors]
    if len(tensors) != 1 or tensors[0].ndim != 2 or num_positions != tensors[0].shape[0]:
        raise AdapterError(
            f"soft prompt {name!r} of {package.label} holds {shapes}, and the manifest says {num_positions} tokens",
            hint="It needs one tensor of shape [tokens, hidden_size].",
        )
    return tensors[0]
