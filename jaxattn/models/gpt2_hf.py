"""GPT-2 as Hugging Face stores it. Its Conv1D kernels are [in, out], as ours."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxattn.models.config import GPT2Config
from jaxattn.models.mapping import HFMapping, Tensors, read_field, require

PREFIX = "transformer."


def config_from_hf(fields: Mapping[str, Any]) -> GPT2Config:
    require(fields, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    require(fields, "scale_attn_weights", (True,), True)
    require(fields, "scale_attn_by_inverse_layer_idx", (False,), False)
    require(fields, "add_cross_attention", (False,), False)
    return GPT2Config(
        vocab_size=read_field(fields, "vocab_size"),
        num_layers=read_field(fields, "n_layer"),
        embed_dim=read_field(fields, "n_embd"),
        num_heads=read_field(fields, "n_head"),
        mlp_dim=fields.get("n_inner") or 0,
        max_positions=read_field(fields, "n_positions"),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        dropout_rate=fields.get("resid_pdrop", 0.1),
    )


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout_rate),
    }


def _to_groups(qkv: np.ndarray, config: GPT2Config) -> np.ndarray:
    """Columns [3, N, H] -> [N, 3, H]: see layers.SelfAttention."""
    columns = qkv.reshape(*qkv.shape[:-1], 3, config.num_heads, config.head_dim)
    return np.swapaxes(columns, -3, -2).reshape(qkv.shape)


def _from_groups(qkv: np.ndarray, config: GPT2Config) -> np.ndarray:
    columns = qkv.reshape(*qkv.shape[:-1], config.num_heads, 3, config.head_dim)
    return np.swapaxes(columns, -3, -2).reshape(qkv.shape)


# ours, theirs, sizes of a linear layer of a block
def _linears(config: GPT2Config) -> list[tuple[tuple[str, str], str, tuple[int, int]]]:
    embed, mlp = config.embed_dim, config.mlp_dim
    return [
        (("attention", "qkv"), "attn.c_attn", (embed, 3 * embed)),
        (("attention", "out"), "attn.c_proj", (embed, embed)),
        (("mlp", "up"), "mlp.c_fc", (embed, mlp)),
        (("mlp", "down"), "mlp.c_proj", (mlp, embed)),
    ]


NORMS = (("attention_norm", "ln_1"), ("mlp_norm", "ln_2"))


def params_from_hf(tensors: Tensors, config: GPT2Config) -> dict[str, Any]:
    prefix = PREFIX if f"{PREFIX}wte.weight" in tensors else ""  # a bare GPT2Model has none
    embed = config.embed_dim
    tensors.skip(lambda name: name.endswith((".attn.bias", ".attn.masked_bias")))  # the causal mask, stored
    if config.tie_embeddings:
        tensors.skip(lambda name: name == "lm_head.weight")

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors.take(f"{name}.weight", embed), "bias": tensors.take(f"{name}.bias", embed)}

    def block(name: str) -> dict[str, Any]:
        params: dict[str, Any] = {"attention": {}, "mlp": {}}
        for (part, layer), theirs, (size_in, size_out) in _linears(config):
            kernel = tensors.take(f"{name}.{theirs}.weight", size_in, size_out)
            bias = tensors.take(f"{name}.{theirs}.bias", size_out)
            if layer == "qkv":
                kernel, bias = _to_groups(kernel, config), _to_groups(bias, config)
            params[part][layer] = {"kernel": kernel, "bias": bias}
        return params | {ours: norm(f"{name}.{theirs}") for ours, theirs in NORMS}

    params = {
        "token_embedding": {"table": tensors.take(f"{prefix}wte.weight", config.vocab_size, embed)},
        "position_embedding": {"table": tensors.take(f"{prefix}wpe.weight", config.max_positions, embed)},
        "blocks": {str(i): block(f"{prefix}h.{i}") for i in range(config.num_layers)},
        "final_norm": norm(f"{prefix}ln_f"),
    }
    if not config.tie_embeddings:
        params["output_embedding"] = {"table": tensors.take("lm_head.weight", config.vocab_size, embed)}
    return params


def params_to_hf(params: Mapping[str, Any], config: GPT2Config) -> dict[str, np.ndarray]:
    tensors = {
        f"{PREFIX}wte.weight": params["token_embedding"]["table"],
        f"{PREFIX}wpe.weight": params["position_embedding"]["table"],
        f"{PREFIX}ln_f.weight": params["final_norm"]["scale"],
        f"{PREFIX}ln_f.bias": params["final_norm"]["bias"],
    }
    for i in range(config.num_layers):
        block, name = params["blocks"][str(i)], f"{PREFIX}h.{i}"
        for (part, layer), theirs, _ in _linears(config):
            kernel, bias = block[part][layer]["kernel"], block[part][layer]["bias"]
            if layer == "qkv":
                kernel, bias = _from_groups(kernel, config), _from_groups(bias, config)
            tensors |= {f"{name}.{theirs}.weight": kernel, f"{name}.{theirs}.bias": bias}
        for ours, theirs in NORMS:
            tensors[f"{name}.{theirs}.weight"] = block[ours]["scale"]
            tensors[f"{name}.{theirs}.bias"] = block[ours]["bias"]
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["output_embedding"]["table"]
    return tensors


HF = HFMapping(config_from_hf, config_to_hf, params_from_hf, params_to_hf)
