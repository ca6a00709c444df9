"""llama.cpp's .gguf files, read: quantized weights become float32, the tokenizer comes from the file's
tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxattn.models import LlamaConfig, RopeScaling, model_from_params
from jaxattn.models.llama_hf import params_from_hf
from jaxattn.models.mapping import Tensors
from jaxattn.tokenizer import BPETokenizer, byte_level_bpe
from jaxattn.weights.loaded import GenerationDefaults, LoadedModel, cast_arrays

ARCHITECTURES = ("llama",)
CONTROL, USER_DEFINED = 3, 4  # gguf.TokenType: never merged from text pieces

# Hugging Face's names of LLaMA's tensors, by which the rest of the reading is shared.
TENSOR_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_TENSOR_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class _Fields:
    """The key-value part of a .gguf file."""

    def __init__(self, reader: gguf.GGUFReader, path: Path):
        self._fields, self.path = reader.fields, path

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"{self.path}: the key {key!r} is missing")
        return self.get(key)


def _open(path: str | Path) -> tuple[gguf.GGUFReader, _Fields]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # truncated files fail in many ways inside NumPy
        raise ValueError(f"{path}: broken .gguf file ({type(error).__name__}: {error})") from error
    return reader, _Fields(reader, path)


def load_gguf(path: str | Path, *, dtype: Any = None) -> LoadedModel:
    """The model of a .gguf file of the LLaMA architecture, in `dtype` (None: float32)."""
    reader, fields = _open(path)
    architecture = fields["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported, only {list(ARCHITECTURES)}"
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tie_embeddings="output.weight" not in stored)
    tensors = _tensors(stored, config, str(path))
    params = params_from_hf(tensors, config)
    tensors.check_all_taken()
    tokenizer = _tokenizer(fields)
    model = model_from_params(config, cast_arrays(params, dtype))
    return LoadedModel(model, tokenizer, GenerationDefaults(eos_token_ids=_eos_token_ids(fields)))


def load_gguf_tokenizer(path: str | Path) -> BPETokenizer:
    """The tokenizer in a .gguf file."""
    return _tokenizer(_open(path)[1])


def _config(fields: _Fields, *, tie_embeddings: bool) -> LlamaConfig:
    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"llama.{key}", default)

    num_heads, embed_dim = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_dim = get("attention.key_length", embed_dim // num_heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{fields.path}: rotary positions on a part of the head dim are not supported")
    return LlamaConfig(
        vocab_size=get("vocab_size") or len(fields["tokenizer.ggml.tokens"]),
        num_layers=fields["llama.block_count"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_dim=fields["llama.feed_forward_length"],
        max_positions=fields["llama.context_length"],
        norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        tie_embeddings=tie_embeddings,
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(get("rope.scaling.type", "none"), get("rope.scaling.factor"), fields.path),
    )


def _rope_scaling(kind: str, factor: float | None, path: Path) -> RopeScaling | None:
    if kind == "none":
        return None
    if kind != "linear" or factor is None:
        raise ValueError(f"{path}: rope scaling {kind!r} (factor {factor}) is not supported, only 'linear'")
    return RopeScaling(kind="linear", factor=factor)


def _tensors(stored: dict[str, gguf.ReaderTensor], config: LlamaConfig, source: str) -> Tensors:
    names = dict(TENSOR_NAMES)
    for i in range(config.num_layers):
        for theirs, ours in BLOCK_TENSOR_NAMES.items():
            names[f"model.layers.{i}.{theirs}.weight"] = f"blk.{i}.{ours}.weight"
    unknown = sorted(stored.keys() - set(names.values()))
    if unknown:  # rope_freqs.weight of Llama 3.1, biases, experts
        raise ValueError(f"{source}: {len(unknown)} tensors are not supported: {unknown[:3]}")
    present = {name: theirs for name, theirs in names.items() if theirs in stored}
    return Tensors(list(present), _reader(stored, present, config), source)


def _reader(
    stored: dict[str, gguf.ReaderTensor], names: dict[str, str], config: LlamaConfig
) -> Callable[[str], np.ndarray]:
    def read(name: str) -> np.ndarray:
        tensor = stored[names[name]]
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return _undo_rope_order(array, config.head_dim)
        return array

    return read


def _undo_rope_order(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order, pairs (x[i], x[i + H/2]) side by side, to Hugging Face's
    halves."""
    pairs = kernel.reshape(-1, head_dim // 2, 2, kernel.shape[-1])
    return pairs.swapaxes(1, 2).reshape(kernel.shape)


def _eos_token_ids(fields: _Fields) -> tuple[int, ...]:
    ids = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _tokenizer(fields: _Fields) -> BPETokenizer:
    kind = fields["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise ValueError(f"{fields.path}: tokenizer {kind!r} is not supported, only byte-level BPE ('gpt2')")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    try:
        return byte_level_bpe(
            {token: i for i, token in enumerate(tokens)},
            merges,  # pyright: ignore[reportArgumentType]: each has two parts
            pre=fields.get("tokenizer.ggml.pre", "gpt-2"),
            special_tokens=special,
            eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            add_bos=fields.get("tokenizer.ggml.add_bos_token", False),
            chat_template=fields.get("tokenizer.chat_template"),
        )
    except ValueError as error:
        raise ValueError(f"{fields.path}: {error}") from None
