"""What an adapter changes in each module of a base model, as tensors ready to compute with.

PEFT puts its layers into a skeleton of the model, which has shapes but no weights. So PEFT itself says which modules an
adapter changes, which tensors it needs for that and how they are scaled; it computes nothing here.

Source: the layers of PEFT 0.21.2, whose unmerged results these are.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from pipeline.engine.linear import FrozenLinear, dense_weight
from pipeline.engine.loader import BaseModel, read_adapter_weights, with_peft
from pipeline.errors import AdapterError
from pipeline.package import ExpertPackage

_ADAPTER = "default"  # PEFT's name for the only adapter of a model
_PREFIX = "base_model.model."  # what PEFT puts before the path of a module
_MAX_LAYOUTS = 4
_NORM_ROWS = 512  # of a weight at a time, so that they stay in the cache

Shapes = dict[str, tuple[int, ...]]


class _Tensors:
    """A record whose fields are tensors, groups of tensors, or None."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors of the record."""
        for field in fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, torch.Tensor):
                    yield item


@dataclass(frozen=True)
class LinearDelta(_Tensors):
    """What an expert changes in a linear layer of weight W and bias b.

    The layer then answers `output_scale * (W (input_scale * x) + b) + B' A x + kron(first, second) x + offset`.

    Args:
        own: A weight and a bias that take the place of W and b.
        low_rank: A and the scaled, transposed B: `[rank, in_features]` and `[rank, out_features]`.
        kronecker: The two factors, the second one scaled.
        input_scale: `[in_features]`.
        output_scale: `[out_features]`.
        offset: `[out_features]`.
    """

    own: tuple[torch.Tensor, torch.Tensor | None] | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    kronecker: tuple[torch.Tensor, torch.Tensor] | None = None
    input_scale: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None


@dataclass(frozen=True)
class EmbeddingDelta(_Tensors):
    """What an expert changes in an embedding of weight W: token t becomes `scale * W[t] + A[t] B`.

    Args:
        own: A weight that takes the place of W, `[vocab_size, hidden_size]`.
        low_rank: A and the scaled B: `[vocab_size, rank]` and `[rank, hidden_size]`.
        scale: `[hidden_size]`.
    """

    own: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class NormDelta:
    """A norm over the hidden size that takes the place of the base's."""

    norm: nn.Module

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors of the norm."""
        yield from self.norm.parameters()


Delta = LinearDelta | EmbeddingDelta | NormDelta


class AdapterReader:
    """Reads adapters for one base model, in which nothing is changed and of which no second copy is made.

    Args:
        base: The model.
        plain_module: The base's own module at a path.
    """

    def __init__(self, base: BaseModel, plain_module: Callable[[str], nn.Module]) -> None:
        self._base = base
        self._plain_module = plain_module
        self._layouts: dict[str, tuple[nn.Module, Shapes]] = {}

    def read(self, package: ExpertPackage) -> dict[str, Delta]:
        """Read a package's adapter.

        Returns:
            What changes, by the path of the module in `base.model`, in the base's dtype and on its device.

        Raises:
            AdapterError: The adapter does not fit the base, or changes something that cannot be applied per row.
        """
        skeleton, wanted = self._layout(package)
        weights = read_adapter_weights(package, wanted)
        return _AdapterFile(self._base, package, weights, self._plain_module).deltas(skeleton)

    def _layout(self, package: ExpertPackage) -> tuple[nn.Module, Shapes]:
        """The skeleton with PEFT's layers, and the tensors that a file must hold; experts of a family share both."""
        key = package.adapter.model_dump_json()
        found = self._layouts.pop(key, None)
        if found is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's advice is for training and merging
                adapted = with_peft(_skeleton(self._base.model), package, low_cpu_mem_usage=True)
                found = adapted.base_model.model, _wanted_shapes(adapted)
        self._layouts[key] = found
        if len(self._layouts) > _MAX_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        return found


def _skeleton(model: Any) -> Any:
    """The same architecture without weights."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return type(model)(config)


def _wanted_shapes(adapted: Any) -> Shapes:
    """The names and shapes of the tensors in a file of this adapter."""
    from peft import get_peft_model_state_dict

    config = adapted.peft_config[_ADAPTER]
    pruned = dict(config.rank_pattern or {}) if config.peft_type == "ADALORA" else {}
    if pruned:
        config.rank_pattern = {}  # PEFT would index tensors that have no values
    shapes = {name: list(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
    for name, is_kept in pruned.items():
        path = _PREFIX + name.removesuffix(f".{_ADAPTER}").removesuffix(".lora_E")
        for tensor, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            if f"{path}.{tensor}" in shapes:
                shapes[f"{path}.{tensor}"][axis] = sum(is_kept)
    return {name: tuple(shape) for name, shape in shapes.items()}


class _AdapterFile:
    """The tensors of one adapter file, each of which must be used once."""

    def __init__(
        self,
        base: BaseModel,
        package: ExpertPackage,
        weights: dict[str, torch.Tensor],
        plain_module: Callable[[str], nn.Module],
    ) -> None:
        self._base = base
        self._package = package
        self._weights = weights
        self._plain_module = plain_module

    def deltas(self, skeleton: nn.Module) -> dict[str, Delta]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        deltas: dict[str, Delta] = {}
        for path, layer in skeleton.named_modules():
            if isinstance(layer, AuxiliaryTrainingWrapper):
                deltas |= self._saved_modules(path, layer)
            elif isinstance(layer, BaseTunerLayer):
                delta = self._adapted_layer(path, layer)
                if delta is not None:
                    deltas[path] = delta
        for name in list(self._weights):
            deltas |= self._lone_bias(name)
        return deltas

    def _adapted_layer(self, path: str, layer: Any) -> Delta | None:
        from peft.tuners import adalora, ia3, lokr, lora

        kinds: dict[type, Callable[[str, Any, Any], Delta | None]] = {
            lora.layer.Linear: self._lora,
            lora.layer.Embedding: self._lora_embedding,
            adalora.layer.SVDLinear: self._adalora,
            ia3.layer.Linear: self._ia3,
            lokr.layer.Linear: self._lokr,
        }
        plain = self._plain_module(path)
        read = kinds.get(type(layer))
        wanted = nn.Embedding if read == self._lora_embedding else nn.Linear | FrozenLinear
        if read is None or not isinstance(plain, wanted):
            raise self._error(path, f"a {type(plain).__name__} cannot be adapted per row")
        return read(path, layer, plain)

    def _lora(self, path: str, layer: Any, plain: Any) -> LinearDelta:
        scaling = layer.scaling[_ADAPTER]
        a = self._take(path, "lora_A.weight")  # [rank, in_features]
        b = self._take(path, "lora_B.weight") * scaling  # [out_features, rank]
        lora_bias = self._take_optional(path, "lora_B.bias")
        magnitude = self._take_optional(path, "lora_magnitude_vector")
        own = self._own_weight(path, plain)
        scale = None  # [out_features]
        if magnitude is not None:
            weight = own if own is not None else dense_weight(plain)
            parts = zip(weight.split(_NORM_ROWS), b.split(_NORM_ROWS), strict=True)
            scale = magnitude / torch.cat([_changed(part, b_part, a).norm(dim=1) for part, b_part in parts])
            b = b * scale[:, None]
        old = None if plain.bias is None else plain.bias.float()
        new = self._take_optional(path, "base_layer.bias")
        offset = _sum(
            None if new is None or old is None else new - old,
            None if lora_bias is None else lora_bias * scaling,
            None if scale is None or old is None else old - scale * old,
        )
        return LinearDelta(
            own=None if own is None else (self._cast(path, own), plain.bias),
            low_rank=(self._cast(path, a), self._cast(path, b.T)),
            output_scale=self._cast_optional(path, scale),
            offset=self._cast_optional(path, offset),
        )

    def _lora_embedding(self, path: str, layer: Any, plain: Any) -> EmbeddingDelta:
        a = self._take(path, "lora_embedding_A").T  # [vocab_size, rank]
        b = self._take(path, "lora_embedding_B").T * layer.scaling[_ADAPTER]  # [rank, hidden_size]
        magnitude = self._take_optional(path, "lora_magnitude_vector")
        own = self._own_weight(path, plain)
        scale = None
        if magnitude is not None:
            weight = own if own is not None else plain.weight
            parts = zip(weight.split(_NORM_ROWS), a.split(_NORM_ROWS), strict=True)
            squares = [_changed(part, a_part, b).square().sum(dim=0) for part, a_part in parts]
            scale = magnitude / torch.stack(squares).sum(dim=0).sqrt()  # [hidden_size]
            b = b * scale
        embed_scale = getattr(plain, "embed_scale", None)  # Gemma multiplies what it looks up
        if isinstance(embed_scale, torch.Tensor):
            b = b * embed_scale.float()
        return EmbeddingDelta(
            own=self._cast_optional(path, own),
            low_rank=(self._cast(path, a), self._cast(path, b)),
            scale=self._cast_optional(path, scale),
        )

    def _adalora(self, path: str, layer: Any, plain: Any) -> LinearDelta | None:
        a = self._take(path, "lora_A") * self._take(path, "lora_E")  # [rank, in_features], the singular values inside
        # PEFT divides by the rank before pruning, and keeps doing so
        b = self._take(path, "lora_B") * (layer.scaling[_ADAPTER] / (layer.r[_ADAPTER] + 1e-5))  # [out_features, rank]
        new = self._take_optional(path, "base_layer.bias")
        offset = None if new is None else new - plain.bias.float()
        low_rank = (self._cast(path, a), self._cast(path, b.T)) if a.shape[0] else None
        if low_rank is None and offset is None:
            return None
        return LinearDelta(low_rank=low_rank, offset=self._cast_optional(path, offset))

    def _ia3(self, path: str, layer: Any, _plain: Any) -> LinearDelta:
        scale = self._cast(path, self._take(path, "ia3_l").flatten())
        return LinearDelta(input_scale=scale) if layer.is_feedforward else LinearDelta(output_scale=scale)

    def _lokr(self, path: str, layer: Any, _plain: Any) -> LinearDelta:
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            factor = self._take_optional(path, name)
            if factor is None:
                factor = self._take(path, f"{name}_a") @ self._take(path, f"{name}_b")
            factors.append(factor)
        first, second = factors
        return LinearDelta(kronecker=(self._cast(path, first), self._cast(path, second * layer.scaling[_ADAPTER])))

    def _saved_modules(self, path: str, wrapper: Any) -> dict[str, Delta]:
        """Modules that were trained whole, or all those inside of one."""
        deltas: dict[str, Delta] = {}
        for inner, module in wrapper.modules_to_save[_ADAPTER].named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names:
                full = f"{path}.{inner}" if inner else path
                deltas[full] = self._saved_module(full, names)
        return deltas

    def _saved_module(self, path: str, names: list[str]) -> Delta:
        plain = self._plain_module(path)
        values = {name: self._cast(path, self._pop(path, name)) for name in names}
        if isinstance(plain, nn.Linear | FrozenLinear):
            return LinearDelta(own=(values["weight"], values.get("bias")))
        if isinstance(plain, nn.Embedding):
            return EmbeddingDelta(own=values["weight"])
        if not type(plain).__name__.endswith("Norm"):
            raise self._error(path, f"a {type(plain).__name__} cannot be exchanged per row")
        hidden_size = self._base.model.config.get_text_config().hidden_size
        if any(value.shape != (hidden_size,) for value in values.values()):
            raise self._error(path, "a norm inside of attention cannot be exchanged per row")
        own = copy.deepcopy(plain)
        for name, value in values.items():
            setattr(own, name, nn.Parameter(value, requires_grad=False))
        return NormDelta(own)

    def _lone_bias(self, name: str) -> dict[str, Delta]:
        """A trained bias of a module that the adapter does not change otherwise."""
        path, _, field = name.removeprefix(_PREFIX).rpartition(".")
        new = self._pop(path, field)
        try:
            plain: Any = self._plain_module(path)
        except AttributeError:
            plain = None
        old = getattr(plain, field, None)
        if old is None or field != "bias":
            raise self._error(path, f"{field} is none that can be applied")
        if torch.equal(new.to(old), old):
            return {}
        if not isinstance(plain, nn.Linear | FrozenLinear):
            raise self._error(path, f"the bias of a {type(plain).__name__} cannot be exchanged per row")
        return {path: LinearDelta(offset=self._cast(path, new.float() - old.float()))}

    def _own_weight(self, path: str, plain: Any) -> torch.Tensor | None:
        """The copy of an embedding or head that PEFT saves beside its adapter, where it differs from the base's."""
        if f"{_PREFIX}{path}.base_layer.weight" not in self._weights:
            return None
        own = self._pop(path, "base_layer.weight")
        old = dense_weight(plain)
        return None if torch.equal(own.to(old.dtype), old) else own

    def _pop(self, path: str, name: str) -> torch.Tensor:
        return self._weights.pop(f"{_PREFIX}{path}.{name}").to(self._base.device)

    def _take(self, path: str, name: str) -> torch.Tensor:
        return self._pop(path, name).float()

    def _take_optional(self, path: str, name: str) -> torch.Tensor | None:
        return self._take(path, name) if f"{_PREFIX}{path}.{name}" in self._weights else None

    def _cast(self, path: str, value: torch.Tensor) -> torch.Tensor:
        cast = value.to(self._base.dtype).contiguous()
        if not cast.isfinite().all():
            raise self._error(path, f"holds values that {self._base.dtype} cannot hold", hint="Run it in float32.")
        return cast

    def _cast_optional(self, path: str, value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else self._cast(path, value)

    def _error(self, path: str, why: str, hint: str = "Run this expert alone: then it is merged.") -> AdapterError:
        return AdapterError(
            f"the adapter of {self._package.label} cannot run beside others", details=(f"{path}: {why}",), hint=hint
        )


def _changed(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A weight with a low-rank product added, in float32."""
    return weight.to(torch.float32, copy=True).addmm_(left, right)


def _sum(*terms: torch.Tensor | None) -> torch.Tensor | None:
    given = [term for term in terms if term is not None]
    return torch.stack(given).sum(dim=0) if given else None
