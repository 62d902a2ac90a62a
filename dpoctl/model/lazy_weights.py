"""Lazy weights: parameters without memory, which know the tensor in a checkpoint's files that they are to be read from.

A model that is divided over ranks is built from them, so that no rank ever holds all of it: each rank reads only its
rows of a parameter when that is divided. A weight that is quantised is read whole for that, one layer at a time.

transformers itself maps the names in the files to those of the model, and reports what is missing: it is given tensors
on the meta device, and the storage of each parameter afterwards tells which tensor it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpoctl.model.integrity import weight_files
from dpoctl.model.source import Decoder, ModelSource, reading_model

# Elements that are compared at once.
CHUNK = 1 << 24


class StoredTensor:
    """A tensor in a file of a checkpoint, which takes the place of a slice of safetensors while transformers loads.

    Args:
        stored: the slice of safetensors, which reads nothing before it is indexed.
        device: where the tensor shall be once it is read.
    """

    def __init__(self, stored: Any, device: torch.device) -> None:
        self._stored, self.device = stored, device
        self.shape = torch.Size(stored.get_shape())
        # One storage, as transformers may ask more than once.
        self._meta: dict[torch.dtype | None, Tensor] = {}

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Return rows of the tensor, all of them without arguments."""
        rows: Tensor = self._stored[start:end] if self.shape else self._stored[...]
        return rows

    def is_equal(self, other: "StoredTensor") -> bool:
        """Whether another tensor has the same numbers."""
        if self.shape != other.shape:
            return False
        step = max(1, CHUNK // max(1, self.shape[1:].numel()))
        starts = range(0, self.shape[0] if self.shape else 1, step)
        return all(torch.equal(self.read(at, at + step), other.read(at, at + step)) for at in starts)

    def get_shape(self) -> list[int]:
        """Return the shape, as a slice of safetensors does."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the name of the dtype, as a slice of safetensors does."""
        return str(self._stored.get_dtype())

    def __getitem__(self, _index: Any) -> Self:
        return self

    def to(self, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """Return a tensor on the meta device in place of this one."""
        return self._meta.setdefault(dtype, torch.empty(self.shape, dtype=dtype, device="meta"))

    def storages(self) -> Iterator[int]:
        """Yield what identifies the storages of the tensors on the meta device."""
        return (storage_id(tensor) for tensor in self._meta.values())


class LazyParameter(nn.Parameter):
    """A parameter that is still in its file; it has a shape and a dtype, but no memory, and all its numbers are NaN.

    It is not on the meta device, because peft moves an adapter to the device of its layer.
    """

    lazy: StoredTensor
    lazy_dtype: torch.dtype

    @classmethod
    def of(cls, stored: StoredTensor, dtype: torch.dtype) -> Self:
        """Return a parameter for a tensor in a file.

        Args:
            stored: the tensor.
            dtype: the dtype that its numbers are rounded to; one that the parameter gets later is a copy of those.
        """
        parameter = cls(torch.full((), torch.nan, dtype=dtype).expand(stored.shape), requires_grad=False)
        parameter.lazy, parameter.lazy_dtype = stored, dtype
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).of(self.lazy, self.lazy_dtype).requires_grad_(self.requires_grad)
        if self.dtype != self.lazy_dtype:
            copied.data = self.data
        memo[id(self)] = copied
        return cast(Self, copied)


@dataclass(frozen=True)
class Waiting:
    """A lazy parameter that is on the meta device while its module is divided.

    Attributes:
        stored: the tensor in the file.
        dtype: the dtype that its numbers are rounded to.
        holders: the modules that have the parameter, and its name there; tied layers share one.
    """

    stored: StoredTensor
    dtype: torch.dtype
    holders: list[tuple[nn.Module, str]]

    def put(self, parameter: nn.Parameter) -> None:
        """Put another parameter in its place."""
        for module, name in self.holders:
            setattr(module, name, parameter)


def storage_id(tensor: Tensor) -> int:
    """Return what is the same for two tensors that share their storage, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def load_lazily(
    source: ModelSource, decoder: Decoder, device: torch.device, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, Any] | None:
    """Load a model without its weights, as `from_pretrained` would with them.

    Args:
        source: the model.
        decoder: its configuration.
        device: where the weights shall be once they are read.
        options: arguments of `from_pretrained`.

    Returns:
        The model on the CPU, and the report of what is missing; None if it cannot be loaded this way, because the model
        has code of its own, is quantised already, or has weights that are converted when they are read.
    """
    if source.trust_remote_code and hasattr(decoder.config, "auto_map"):
        return None
    if getattr(decoder.config, "quantization_config", None) is not None:
        return None
    with reading_model(source.name):
        stored = _open(source, device)
        if stored is None:
            return None
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(decoder.config)]
        try:
            model, report = model_class.from_pretrained(None, state_dict=stored, device_map={"": "cpu"}, **options)
        except (NotImplementedError, RuntimeError):
            # A conversion that looks at numbers, of which there are none on the meta device.
            return None
        if not _make_lazy(model, stored.values()):
            return None
        model.config.name_or_path = model.name_or_path = source.name
        model.generation_config = _generation_config(source)
    return model, report


def is_lazy(parameter: Tensor) -> bool:
    """Whether a parameter is still in its file."""
    return getattr(parameter, "lazy", None) is not None


def float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32; one without memory has none afterwards either."""
    if any(tensor.stride()):
        return tensor.float()
    return tensor.as_strided((), ()).float().expand(tensor.shape)


def read_whole(module: nn.Module) -> None:
    """Read all lazy parameters of a module, which are replaced."""
    for waiting, parameter in list(_lazy_parameters(module)):
        waiting.put(_read(parameter, waiting.holders[0][0]))


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Read the lazy parameters of a module, and forget them again after the context."""
    lazy = list(_lazy_parameters(module))
    read_whole(module)
    try:
        yield
    finally:
        for waiting, parameter in lazy:
            waiting.put(parameter)


@contextmanager
def divided(module: nn.Module, *, host: bool) -> Iterator[None]:
    """Divide a module with lazy parameters inside the context, and read this rank's parts of them after it.

    Quantised parameters are read whole before it.

    Args:
        module: is sharded inside.
        host: keep the parts in host memory.
    """
    waits = []
    for waiting, parameter in list(_lazy_parameters(module)):
        if isinstance(parameter, LazyParameter):
            waits.append(waiting)
            waiting.put(nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
        else:
            waiting.put(_read(parameter, waiting.holders[0][0]))
    yield
    for waiting in waits:
        _fill(waiting, torch.device("cpu") if host else waiting.stored.device)


def _open(source: ModelSource, device: torch.device) -> dict[str, StoredTensor] | None:
    """Open the weights of a model, and return its tensors by name; None if it has no safetensors weights."""
    files: list[Any] = [safe_open(path, framework="pt") for path in weight_files(source)]
    tensors = {name: StoredTensor(file.get_slice(name), device) for file in files for name in file.keys()}  # noqa: SIM118
    return tensors or None


def _make_lazy(model: PreTrainedModel, stored: Iterable[StoredTensor]) -> bool:
    """Replace the tensors of a model on the meta device by lazy ones, and read the small ones.

    Returns:
        Whether each of them is one tensor of the files, as it is there.
    """
    known = {number: one for one in stored for number in one.storages()}
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in _own_tensors(module):
            if not tensor.is_meta:
                continue
            one = known.get(storage_id(tensor))
            if one is None or not _is_as_stored(tensor, one):
                return False
            if name in module._buffers:
                module._buffers[name] = one.read().to(one.device, tensor.dtype)
            else:
                number = storage_id(tensor)
                if number not in replaced:
                    replaced[number] = _lazy(module, tensor, one)
                setattr(module, name, replaced[number])
    _tie(model)
    return True


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _is_as_stored(tensor: Tensor, stored: StoredTensor) -> bool:
    """Whether a tensor is the one in the file; that of a quantised layer may be its transpose."""
    if _is_packed(tensor):
        return tensor.numel() == stored.shape.numel()
    return tensor.shape == stored.shape and tensor.is_contiguous() and tensor.storage_offset() == 0


def _lazy(module: nn.Module, tensor: Tensor, stored: StoredTensor) -> nn.Parameter:
    if not _is_packed(tensor):
        # Norms and biases are small, and norms are compared with fused ones when the model is loaded.
        if tensor.ndim < 2:
            return nn.Parameter(stored.read().to(stored.device, tensor.dtype), requires_grad=False)
        return LazyParameter.of(stored, tensor.dtype)
    # Packed as it will be: peft gives adapters the dtype of a weight of floating-point numbers.
    size = (tensor.numel() + 1) // 2
    settings = vars(tensor) | {"module": module, "lazy": stored}
    packed: Any = type(tensor)
    empty = torch.zeros((), dtype=settings["quant_storage"]).expand(size // settings["quant_storage"].itemsize, 1)
    lazy = packed(empty, requires_grad=False, **settings)
    vars(lazy).update(lazy=stored, lazy_dtype=tensor.dtype)
    return cast(nn.Parameter, lazy)


def _is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is, or will be, of 4 bits; does not import bitsandbytes."""
    return type(parameter).__name__ == "Params4bit"


def _tie(model: PreTrainedModel) -> None:
    """Tie the weights that are equal in the files: transformers compares what it has read, and it has read nothing."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, origin in list(tied.items()):
        first, second = model.get_parameter(origin), model.get_parameter(target)
        if first is second or not (isinstance(first, LazyParameter) and isinstance(second, LazyParameter)):
            continue
        if first.lazy.is_equal(second.lazy):
            holder, _, name = target.rpartition(".")
            setattr(model.get_submodule(holder), name, first)
        else:
            del tied[target]


def _generation_config(source: ModelSource) -> GenerationConfig:
    options = {name: value for name, value in source.options.items() if name != "trust_remote_code"}
    try:
        return GenerationConfig.from_pretrained(source.name, **options)
    except OSError:
        # As transformers does.
        return GenerationConfig.from_pretrained(
            source.name, config_file_name="config.json", _from_model_config=True, **options
        )


def _lazy_parameters(module: nn.Module) -> Iterator[tuple[Waiting, nn.Parameter]]:
    """Yield the lazy parameters of a module, each once, with all modules that have it."""
    found: dict[int, tuple[Waiting, nn.Parameter]] = {}
    for holder in module.modules():
        for name, parameter in holder.named_parameters(recurse=False):
            if is_lazy(parameter):
                lazy: Any = parameter
                waiting, _ = found.setdefault(id(parameter), (Waiting(lazy.lazy, lazy.lazy_dtype, []), parameter))
                waiting.holders.append((holder, name))
    yield from found.values()


def _read(parameter: nn.Parameter, holder: nn.Module) -> nn.Parameter:
    """Read a lazy parameter whole, and quantise it if it is to be."""
    lazy: Any = parameter
    stored: StoredTensor = lazy.lazy
    weight = stored.read().to(stored.device, lazy.lazy_dtype)
    if isinstance(parameter, LazyParameter):
        return nn.Parameter(weight.to(parameter.dtype), requires_grad=parameter.requires_grad)
    if issubclass(cast(Any, holder).source_cls, Conv1D):
        weight = weight.T
    packed: Any = type(parameter)
    return cast(nn.Parameter, packed(weight, requires_grad=False, **vars(parameter)).to(stored.device))


@torch.no_grad()
def _fill(waiting: Waiting, device: torch.device) -> None:
    """Read this rank's rows of a parameter that was divided on the meta device."""
    holder, name = waiting.holders[0]
    divided_one = cast(DTensor, getattr(holder, name))
    mesh: Any = divided_one.device_mesh
    shards, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    rows = -(-divided_one.shape[0] // shards)
    parameter = nn.Parameter(torch.empty_like(divided_one, device=device), requires_grad=divided_one.requires_grad)
    own = cast(DTensor, parameter.detach()).to_local()
    if len(own):
        own.copy_(waiting.stored.read(index * rows, index * rows + len(own)).to(waiting.dtype))
    for module, own_name in waiting.holders:
        # After a loading into it a sharded module takes the parameter as its own.
        module.load_state_dict({own_name: parameter}, strict=False, assign=True)
