"""What a model is made of: frozen dataclasses, one a family, that check themselves."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxattn.layers.rope import RopeScaling

__all__ = ["GPT2Config", "LlamaConfig", "ModelConfig", "RopeScaling"]


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes every family shares; all are counts of elements."""

    model_type: ClassVar[str]

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    max_positions: int  # the context length: positions 0 .. max_positions - 1
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the output head is the input embedding, transposed
    dropout_rate: float = 0.0  # on embeddings and residuals, only when a forward is given a dropout key

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_positions"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, name, value, "an integer of at least 1")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "greater than 0")
        _require(0 <= self.dropout_rate < 1, "dropout_rate", self.dropout_rate, "in [0, 1)")

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, `model_type` among them; `models.config_from_dict` reads it back."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote; an unknown key is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in fields.items() if key != "model_type"}
        unknown = sorted(given.keys() - known)
        _require(not unknown, "config keys", unknown, f"among {sorted(known)}")
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None

    def __str__(self) -> str:
        return json.dumps(self.to_dict())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2 (Radford et al. 2019): learned positions, layer norm before each sublayer, tanh-GELU, biases."""

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int = 50257
    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 0  # 0 stands for 4 * embed_dim
    max_positions: int = 1024

    def __post_init__(self) -> None:
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)
        super().__post_init__()
        _require(
            self.embed_dim % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"a divisor of embed_dim={self.embed_dim}",
        )

    @classmethod
    def small(cls, **changes: Any) -> Self:
        return cls(**changes)

    @classmethod
    def medium(cls, **changes: Any) -> Self:
        return cls(**{"num_layers": 24, "embed_dim": 1024, "num_heads": 16, **changes})

    @classmethod
    def large(cls, **changes: Any) -> Self:
        return cls(**{"num_layers": 36, "embed_dim": 1280, "num_heads": 20, **changes})

    @classmethod
    def xl(cls, **changes: Any) -> Self:
        return cls(**{"num_layers": 48, "embed_dim": 1600, "num_heads": 25, **changes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """LLaMA (Touvron et al. 2023): RMS norm, rotary positions, grouped KV heads, SwiGLU."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32000
    num_layers: int = 16
    embed_dim: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 0  # 0 stands for embed_dim // num_heads
    mlp_dim: int = 8192
    max_positions: int = 8192
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            _require(
                self.embed_dim % self.num_heads == 0,
                "num_heads",
                self.num_heads,
                f"a divisor of embed_dim={self.embed_dim} where head_dim is not given",
            )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        super().__post_init__()
        _require(self.num_kv_heads >= 1, "num_kv_heads", self.num_kv_heads, "at least 1")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: rotary positions turn pairs")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "greater than 0")

    @classmethod
    def smollm2_135m(cls, **changes: Any) -> Self:
        sizes = {"vocab_size": 49152, "num_layers": 30, "embed_dim": 576, "num_heads": 9, "num_kv_heads": 3}
        rest = {"mlp_dim": 1536, "max_positions": 8192, "tie_embeddings": True, "rope_theta": 100000.0}
        return cls(**{**sizes, **rest, **changes})

    @classmethod
    def llama3_8b(cls, **changes: Any) -> Self:
        sizes = {"vocab_size": 128256, "num_layers": 32, "embed_dim": 4096, "mlp_dim": 14336}
        return cls(**{**sizes, "max_positions": 8192, "rope_theta": 500000.0, **changes})
