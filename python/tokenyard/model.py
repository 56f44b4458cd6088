"""What a model's configuration file says of its MoE layers, and a rank's weights out of its checkpoint."""
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy

from . import weights
from ._core import ExpertShape, Gate, Placement
from .arrays import is_torch, torch_if_used
from .errors import UsageError


@dataclass
class MoeWeights:
    """The arrays of one layer on one rank; None for what a model does not have. Gradients come in the same form, float32.

    gate_weight [E,H], logit_bias [E] (added to the logits), selection_bias [E] float32 (of Gate.bias_corrected); of this rank's shard of
    the experts w13 [L,2,I,H] (gate, up), w2 [L,H,I], w13_bias [L,2,I], w2_bias [L,H] (with tensor parallelism on shard 0 alone); of the
    shared expert the same with L = 1, and shared_gate [1,H]: its rows are multiplied by sigmoid(<x, shared_gate>). With w13 and w2 in fp8
    (in NumPy uint8), for forward alone, w13_scale [L, 2, I / 128, ceil(H / 128)] and w2_scale [L, ceil(H / 128), I / 128] float32.
    """

    gate_weight: Any = None
    logit_bias: Any = None
    selection_bias: Any = None
    w13: Any = None
    w2: Any = None
    w13_bias: Any = None
    w2_bias: Any = None
    shared_w13: Any = None
    shared_w2: Any = None
    shared_w13_bias: Any = None
    shared_w2_bias: Any = None
    shared_gate: Any = None
    w13_scale: Any = None
    w2_scale: Any = None

    def items(self):
        """(name, array) of all, in the order above."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True)
class MoeModel:
    """The MoE layers of a model: family of its checkpoints, sizes, gate and activation. read() takes them from a configuration file."""

    family: str
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    gate: Any
    shared_expert_width: int = 0
    activation: str = "silu"
    limit: float = 7.0
    alpha: float = 1.702

    @staticmethod
    def read(path) -> "MoeModel":
        """From config.json, or the folder that has it. UsageError for a family that this library does not know, or a missing size."""
        path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: {error}; expected the config.json that lies beside a model's safetensors files") from None
        return _Reader(path, config).model()

    @property
    def shape(self) -> ExpertShape:
        """Of the experts."""
        return ExpertShape(self.num_experts, self.hidden_size, self.expert_width)

    @property
    def shared_shape(self) -> ExpertShape:
        """Of the shared expert: one expert, however many the model counts."""
        return ExpertShape(1, self.hidden_size, self.shared_expert_width)

    def load(self, checkpoint, layer, group, *, framework="numpy", dtype=None, keep_fp8=False, placement=None) -> MoeWeights:
        """This rank's weights of a layer: of a Checkpoint's files, its own parts alone. Local: no other rank is asked.

        dtype: None as in the files; "float32" widens. fp8 with block scales becomes float32, or dtype. keep_fp8: experts that are fp8 in
        the files stay so, with their scales, as layers take them for forward alone; their shards must not cut a scale's block. placement:
        over group.world, where the experts are; default: group.placement().
        """
        loader = _Loader(checkpoint, self.family, layer, framework, dtype)
        placement = placement or group.placement(self.num_experts)
        placed = self.shape, placement, group.world.rank, weights.expert_source
        found = MoeWeights()
        for name in ("w13", "w2", *(("w13_bias", "w2_bias") if self.family == "gpt_oss" else ())):
            kept = keep_fp8 and loader.is_fp8(name, *placed)
            setattr(found, name, loader.as_it_is(name, *placed) if kept else loader.expert(name, *placed))
            if kept:
                setattr(found, f"{name}_scale", loader.as_it_is(f"{name}_scale", *placed))
        weight, bias = weights.gate_names(self.family, layer)
        found.gate_weight = loader.whole(weight)
        if bias:
            setattr(found, "logit_bias" if self.family == "gpt_oss" else "selection_bias", loader.whole(bias, None if self.family == "gpt_oss" else "float32"))
        if self.shared_expert_width:
            cut = Placement.tensor_parallel(1, 1, group.dense_tp)
            for name in ("w13", "w2"):
                setattr(found, f"shared_{name}", loader.expert(name, self.shared_shape, cut, group.dense_rank, weights.shared_expert_source))
        return found


class _Reader:
    """A configuration file of Hugging Face transformers."""

    def __init__(self, path, config):
        self._path, self._config = path, config

    def _number(self, *names):
        for name in names:
            if self._config.get(name) is not None:
                return self._config[name]
        raise UsageError(f"{self._path}: it has no {' or '.join(names)}; expected the configuration of a MoE model")

    def model(self):
        get = self._config.get
        family, top_k = weights.family_name(str(get("model_type"))), self._number("num_experts_per_tok")
        width = self._number("intermediate_size" if family == "gpt_oss" else "moe_intermediate_size")
        sizes = {"family": family, "top_k": top_k, "hidden_size": self._number("hidden_size"), "expert_width": width,
                 "num_experts": self._number("n_routed_experts", "num_experts", "num_local_experts")}
        if family == "gpt_oss":
            return MoeModel(**sizes, gate=Gate.softmax(top_k, renormalise=True), activation="clamped", limit=get("swiglu_limit", 7.0),
                            alpha=get("swiglu_alpha", 1.702))
        if family == "qwen3_moe":
            return MoeModel(**sizes, gate=Gate.softmax(top_k, renormalise=bool(get("norm_topk_prob", False))))
        gate = Gate.bias_corrected(top_k, "sigmoid", get("n_group") or 1, get("topk_group") or 1, bool(get("norm_topk_prob", True)),
                                   get("routed_scaling_factor", 1.0))
        return MoeModel(**sizes, gate=gate, shared_expert_width=width * (get("n_shared_experts") or 0))


class _Loader:
    def __init__(self, checkpoint, family, layer, framework, dtype):
        self._checkpoint, self._family, self._layer = checkpoint, family, layer
        self._framework, self._dtype = framework, dtype

    def whole(self, name, dtype=None):
        found = self._checkpoint.dtype(name)
        return _converted(self._checkpoint.read(name, self._framework), found, dtype or self._dtype)

    def is_fp8(self, name, shape, placement, rank, source_of):
        return self._dtype_of(name, shape, source_of) == "float8_e4m3"

    def _dtype_of(self, name, shape, source_of):
        return self._checkpoint.dtype_of(source_of(self._family, self._layer, name, shape))

    def as_it_is(self, name, shape, placement, rank, source_of, framework=None):
        source, map = source_of(self._family, self._layer, name, shape), weights.expert_shard(name, shape, placement, rank)
        return self._checkpoint.read_shard(source, map, framework or self._framework).reshape(weights.local_shape(name, shape, placement, rank))

    def expert(self, name, shape, placement, rank, source_of):
        """A rank's shard; None where it is of w2_bias and elsewhere."""
        if name == "w2_bias" and not weights.expert_shard(name, shape, placement, rank).local_elements:
            return None
        placed = shape, placement, rank, source_of
        array, found = self.as_it_is(name, *placed), self._dtype_of(name, shape, source_of)
        if found != "float8_e4m3":
            return _converted(array, found, self._dtype)
        q = array.view(torch_if_used().uint8).numpy() if is_torch(array) else array
        scales = self.as_it_is(f"{name}_scale", *placed, framework="numpy")
        values = _float8_values()[q] * _per_element(scales, q.shape, shape.scale_block)
        return _converted(torch_if_used().from_numpy(values) if is_torch(array) else values, "float32", self._dtype)


def _float8_values():
    """[256] float32: what e4m3 means ("FP8 Formats for Deep Learning", arXiv 2209.05433)."""
    bits = numpy.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    values = numpy.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[bits & 127 == 127] = numpy.nan
    return numpy.where(bits & 128, -values, values).astype(numpy.float32)


def _per_element(scales, shape, block):
    """Block scales, repeated over the last two axes of a tensor of this shape."""
    for axis in (-2, -1):
        scales = scales.repeat(block, axis=axis)
    return scales[..., :shape[-2], :shape[-1]]


def _converted(array, found, wanted):
    if wanted in (None, found):
        return array
    if is_torch(array):
        return array.to(getattr(torch_if_used(), wanted))
    if found == "bfloat16" and wanted == "float32":
        return (array.astype(numpy.uint32) << 16).view(numpy.float32)
    if "bfloat16" in (found, wanted):
        raise UsageError(f"from {found} to {wanted} in NumPy, which has no bfloat16; use framework='torch'")
    return array.astype(wanted)
