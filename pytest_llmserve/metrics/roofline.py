"""The arithmetic of a model's step on a machine: bytes moved, FLOPs done, and what they allow.

One step of a served model reads every weight once, reads the KV cache of each sequence in the
batch, and multiplies every token of the batch with every weight. The step cannot be shorter than
the slower of the two. All that is here is that sentence in numbers: pure functions on frozen
dataclasses, shared by the emulated engine, by planning and by the `roofline` figure of real runs.

Units: bytes, seconds, FLOPs (a multiply and an add are two), and rates of them per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pytest_llmserve.errors import ConfigError

#: Bytes of one stored element, its share of the scales included. `nvfp4`: 4 bits and one FP8 scale
#: for 16 elements. `int4` (AWQ, GPTQ): 4 bits, and an FP16 scale and a 4-bit zero point for 128.
#: The one FP32 scale of a tensor (`fp8`, `nvfp4`) is nothing beside it and left out.
ELEMENT_BYTES: Mapping[str, float] = {
    "bf16": 2.0,
    "fp8": 1.0,
    "nvfp4": 0.5 + 1 / 16,
    "int4": 0.5 + 2.5 / 128,
}

#: What stays in BF16 whatever the precision of the linear layers: checkpoints quantized for
#: serving leave the embedding and the output head alone.
HEAD_BYTES = ELEMENT_BYTES["bf16"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder-only transformer with grouped-query attention."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    max_positions: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """Read the fields of a Hugging Face `config.json`.

        Raises ConfigError for a mixture of experts, whose bytes a step depend on the routing,
        and for a config that lacks a size.
        """
        if config.get("num_experts") or config.get("num_local_experts"):
            raise ConfigError(
                f"model config {name}: it is a mixture of experts; give the config of a dense model"
            )
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            return cls(
                name=name,
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                max_positions=int(config.get("max_position_embeddings", 2048)),
            )
        except KeyError as missing:
            raise ConfigError(
                f"model config {name}: the key {missing.args[0]!r} is missing; "
                "give the config.json of a dense decoder-only transformer"
            ) from None
        except (TypeError, ValueError) as wrong:
            raise ConfigError(f"model config {name}: a size is not a number ({wrong})") from None

    @property
    def linear_params(self) -> int:
        """Weights of all attention projections and gated MLPs."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_params(self) -> int:
        """Weights of the output head (tied: it is the embedding, read all the same)."""
        return self.vocab * self.hidden

    @property
    def kv_elements(self) -> int:
        """Elements of the KV cache that one token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Hardware:
    """A machine as a roofline sees it.

    `memory` is in bytes, `bandwidth` in bytes/s, `flops` the dense peak by precision in FLOP/s (a
    precision that is not named runs at the BF16 rate, as weight-only kernels do). The
    efficiencies are the shares of bandwidth and peak that kernels reach, `overhead` the seconds a
    step takes beyond both, `source` where the figures are from.

    `link_bandwidth` (bytes/s one way, 0: there is no link) and `link_latency` (seconds of one
    all-reduce of few bytes) are those between two of the kind, `devices` how many work as one.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    bandwidth_efficiency: float
    compute_efficiency: float
    overhead: float
    memory_utilization: float
    source: str
    link_bandwidth: float = 0.0
    link_latency: float = 0.0
    devices: int = 1

    def peak(self, weights: str) -> float:
        return self.flops.get(weights, self.flops["bf16"])

    def joined(self, count: int) -> Hardware:
        """`count` of this machine as one by tensor parallelism: each holds and reads its share.

        Raises ValueError if it has no link, or is joined already.
        """
        if count < 1 or self.devices > 1 or (count > 1 and not self.link_bandwidth):
            raise ValueError(f"{self.title} cannot be joined to {count}")
        return replace(
            self,
            title=self.title if count == 1 else f"{count} × {self.title}",
            memory=count * self.memory,
            bandwidth=count * self.bandwidth,
            flops={name: count * rate for name, rate in self.flops.items()},
            devices=count,
        )


@dataclass(frozen=True)
class Precision:
    """Precisions of the weights of the linear layers and of the KV cache: keys of ELEMENT_BYTES."""

    weights: str = "bf16"
    kv: str = "bf16"

    def __post_init__(self) -> None:
        for key, value in (("weights", self.weights), ("kv", self.kv)):
            if value not in ELEMENT_BYTES:
                raise ConfigError(f"{key} {value!r}: use one of {', '.join(ELEMENT_BYTES)}")


@dataclass(frozen=True)
class Batch:
    """The work of one step, summed over its sequences.

    `tokens` go through the layers; for `sampled` of them logits are made; `kv_read` tokens of
    context are read from the KV cache; `attended` is the sum over tokens of the positions that
    each attends to. Means over many steps need not be whole.
    """

    tokens: float
    sampled: float
    kv_read: float
    attended: float

    @classmethod
    def decode(cls, sequences: float, context: float, drafts: float = 0.0) -> Batch:
        """One token, and `drafts` speculated ones, for each of `sequences` with `context` tokens
        before it."""
        tokens, read = sequences * (1 + drafts), sequences * context
        return cls(tokens, tokens, read, tokens * context)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: `total` = max(`memory`, `compute`) + `overhead`."""

    memory: float
    compute: float
    overhead: float

    @property
    def total(self) -> float:
        return max(self.memory, self.compute) + self.overhead

    @property
    def bound(self) -> Literal["bandwidth", "compute"]:
        return "bandwidth" if self.memory >= self.compute else "compute"


def weight_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes of weights read in one step: linear layers and output head."""
    return shape.linear_params * ELEMENT_BYTES[precision.weights] + shape.head_params * HEAD_BYTES


def resident_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes of weights kept in memory: those of a step and, if it is its own, the embedding."""
    embedding = 0.0 if shape.tied else shape.head_params * HEAD_BYTES
    return weight_bytes(shape, precision) + embedding


def kv_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes of KV cache of one token."""
    return shape.kv_elements * ELEMENT_BYTES[precision.kv]


def step_bytes(shape: ModelShape, precision: Precision, batch: Batch) -> float:
    """Bytes moved in one step. What the batch writes to the KV cache is counted as read once."""
    return weight_bytes(shape, precision) + batch.kv_read * kv_bytes(shape, precision)


def step_flops(shape: ModelShape, batch: Batch) -> float:
    """FLOPs of one step: linear layers, output head, and both products of attention."""
    linear = 2.0 * shape.linear_params * batch.tokens
    head = 2.0 * shape.head_params * batch.sampled
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * batch.attended
    return linear + head + attention


def link_time(shape: ModelShape, hardware: Hardware, batch: Batch) -> float:
    """Seconds a step spends on adding up the parts of joined devices.

    Two all-reduces a layer, of a BF16 hidden state a token, in a ring.
    """
    count = hardware.devices
    if count == 1:
        return 0.0
    size = batch.tokens * shape.hidden * 2.0 * 2 * (count - 1) / count
    return 2 * shape.layers * (hardware.link_latency + size / hardware.link_bandwidth)


def step_time(
    shape: ModelShape, hardware: Hardware, precision: Precision, batch: Batch
) -> StepTime:
    """What one step takes on this machine at its efficiencies."""
    return StepTime(
        memory=step_bytes(shape, precision, batch)
        / (hardware.bandwidth * hardware.bandwidth_efficiency),
        compute=step_flops(shape, batch)
        / (hardware.peak(precision.weights) * hardware.compute_efficiency),
        overhead=hardware.overhead + link_time(shape, hardware, batch),
    )


def decode_ceiling(
    shape: ModelShape, hardware: Hardware, precision: Precision, sequences: float, context: float
) -> float:
    """Output tokens/s that full bandwidth and full compute could feed, whichever binds.

    No efficiency and no overhead: a bound, not an expectation. `context` is the mean number of
    tokens before the one that is made.
    """
    return (
        sequences / full_speed(shape, hardware, precision, Batch.decode(sequences, context)).total
    )


def full_speed(
    shape: ModelShape, hardware: Hardware, precision: Precision, batch: Batch
) -> StepTime:
    """What a step would take at full bandwidth and peak compute, with no overhead."""
    return StepTime(
        memory=step_bytes(shape, precision, batch) / hardware.bandwidth,
        compute=step_flops(shape, batch) / hardware.peak(precision.weights),
        overhead=0.0,
    )


def kv_capacity(shape: ModelShape, hardware: Hardware, precision: Precision) -> int:
    """Tokens of KV cache that fit beside the weights; negative if the weights alone do not."""
    left = hardware.memory * hardware.memory_utilization - resident_bytes(shape, precision)
    return int(left // kv_bytes(shape, precision))
