"""LLaMA as Hugging Face stores it. Its kernels are [out, in]: ours, transposed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxattn.models.config import LlamaConfig, RopeScaling
from jaxattn.models.mapping import HFMapping, Tensors, read_field, require

PREFIX = "model."


def config_from_hf(fields: Mapping[str, Any]) -> LlamaConfig:
    require(fields, "hidden_act", ("silu",), "silu")
    require(fields, "partial_rotary_factor", (None, 1, 1.0), None)
    # transformers 5 keeps theta and scaling in one dict, those before it apart
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    num_heads = read_field(fields, "num_attention_heads")
    return LlamaConfig(
        vocab_size=read_field(fields, "vocab_size"),
        num_layers=read_field(fields, "num_hidden_layers"),
        embed_dim=read_field(fields, "hidden_size"),
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or 0,
        mlp_dim=read_field(fields, "intermediate_size"),
        max_positions=read_field(fields, "max_position_embeddings"),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        rope_theta=rope.get("rope_theta") or fields.get("rope_theta", 10000.0),
        rope_scaling=_scaling_from_hf(rope),
    )


def _scaling_from_hf(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported, only 'linear' and 'llama3'")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=rope["factor"])
    return RopeScaling(
        kind=kind,
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
    )


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
    }


def _join_qkv(parts: list[np.ndarray], config: LlamaConfig) -> np.ndarray:
    """[N*H, ...] and twice [K*H, ...] -> [K*(G+2)*H, ...], grouped by KV head: see layers.SelfAttention."""
    grouped = [x.reshape(config.num_kv_heads, -1, config.head_dim, *x.shape[1:]) for x in parts]
    return np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])


def _split_qkv(joined: np.ndarray, config: LlamaConfig) -> tuple[np.ndarray, ...]:
    group = config.num_heads // config.num_kv_heads
    grouped = joined.reshape(config.num_kv_heads, group + 2, config.head_dim, *joined.shape[1:])
    parts = grouped[:, :group], grouped[:, group], grouped[:, group + 1]
    return tuple(part.reshape(-1, *joined.shape[1:]) for part in parts)


def params_from_hf(tensors: Tensors, config: LlamaConfig) -> dict[str, Any]:
    embed, mlp = config.embed_dim, config.mlp_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors.skip(lambda name: name.endswith(".rotary_emb.inv_freq"))
    if config.tie_embeddings:
        tensors.skip(lambda name: name == "lm_head.weight")

    def linear(name: str, size_in: int, size_out: int, has_bias: bool) -> dict[str, np.ndarray]:
        params = {"kernel": tensors.take(f"{name}.weight", size_out, size_in)}
        return params | ({"bias": tensors.take(f"{name}.bias", size_out)} if has_bias else {})

    def attention(name: str) -> dict[str, Any]:
        bias = config.attention_bias
        sizes = (("q", queries), ("k", keys), ("v", keys))
        parts = [linear(f"{name}.{letter}_proj", embed, size, bias) for letter, size in sizes]
        qkv = {leaf: _join_qkv([part[leaf] for part in parts], config) for leaf in parts[0]}
        return {"qkv": _transposed(qkv), "out": _transposed(linear(f"{name}.o_proj", queries, embed, bias))}

    def feed_forward(name: str) -> dict[str, Any]:
        gate, up = (linear(f"{name}.{part}_proj", embed, mlp, config.mlp_bias) for part in ("gate", "up"))
        gate_up = {"kernel": np.stack([gate["kernel"].T, up["kernel"].T], axis=1)}
        if config.mlp_bias:
            gate_up["bias"] = np.stack([gate["bias"], up["bias"]])
        down = linear(f"{name}.down_proj", mlp, embed, config.mlp_bias)
        return {"gate_up": gate_up, "down": _transposed(down)}

    def block(name: str) -> dict[str, Any]:
        return {
            "attention_norm": {"scale": tensors.take(f"{name}.input_layernorm.weight", embed)},
            "attention": attention(f"{name}.self_attn"),
            "mlp_norm": {"scale": tensors.take(f"{name}.post_attention_layernorm.weight", embed)},
            "mlp": feed_forward(f"{name}.mlp"),
        }

    params = {
        "token_embedding": {"table": tensors.take(f"{PREFIX}embed_tokens.weight", config.vocab_size, embed)},
        "blocks": {str(i): block(f"{PREFIX}layers.{i}") for i in range(config.num_layers)},
        "final_norm": {"scale": tensors.take(f"{PREFIX}norm.weight", embed)},
    }
    if not config.tie_embeddings:
        params["output_embedding"] = {"table": tensors.take("lm_head.weight", config.vocab_size, embed)}
    return params


def _transposed(linear: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return linear | {"kernel": linear["kernel"].T}


def params_to_hf(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    tensors = {
        f"{PREFIX}embed_tokens.weight": params["token_embedding"]["table"],
        f"{PREFIX}norm.weight": params["final_norm"]["scale"],
    }

    def put(name: str, leaf: str, array: np.ndarray) -> None:
        tensors[f"{name}.{'weight' if leaf == 'kernel' else 'bias'}"] = array

    for i in range(config.num_layers):
        block, name = params["blocks"][str(i)], f"{PREFIX}layers.{i}"
        tensors[f"{name}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        tensors[f"{name}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for leaf, array in block["attention"]["qkv"].items():
            for letter, part in zip("qkv", _split_qkv(array.T, config), strict=True):
                put(f"{name}.self_attn.{letter}_proj", leaf, part)
        for leaf, array in block["mlp"]["gate_up"].items():
            put(f"{name}.mlp.gate_proj", leaf, array[..., 0, :].T)
            put(f"{name}.mlp.up_proj", leaf, array[..., 1, :].T)
        for theirs, linear in (
            ("self_attn.o_proj", block["attention"]["out"]),
            ("mlp.down_proj", block["mlp"]["down"]),
        ):
            for leaf, array in linear.items():
                put(f"{name}.{theirs}", leaf, array.T)
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["output_embedding"]["table"]
    return tensors


HF = HFMapping(config_from_hf, config_to_hf, params_from_hf, params_to_hf)
