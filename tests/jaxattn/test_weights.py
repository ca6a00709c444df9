"""Weights in and out beside the golden round trips: shards, checkpoints, .gguf files, and broken ones."""

import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxattn import get_tokenizer, load_model
from jaxattn.models import GPT2Config, LlamaConfig, RopeScaling, create_model, model_params
from jaxattn.tokenizer import ByteTokenizer
from jaxattn.weights import save_hf
from jaxattn.weights.checkpoint import (
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    steps_of,
    write_metadata,
)

SIZES = {"vocab_size": 40, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "max_positions": 32}
GPT2_CONFIG = GPT2Config(**SIZES)
LLAMA_CONFIG = LlamaConfig(
    **SIZES, num_kv_heads=2, mlp_dim=24, rope_scaling=RopeScaling(kind="linear", factor=2.0)
)
both = pytest.mark.parametrize("config", [GPT2_CONFIG, LLAMA_CONFIG], ids=["gpt2", "llama"])


def noisy(config, dtype=jnp.float32):
    """A model in which no two parameters are alike."""
    from jaxattn.models import model_from_params

    params = model_params(create_model(config))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [jax.random.normal(key, x.shape).astype(dtype) for key, x in zip(keys, leaves, strict=True)]
    return model_from_params(config, jax.tree.unflatten(structure, leaves))


def assert_same(model, other):
    ours, theirs = model_params(model), model_params(other)
    assert model.config == other.config
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@both
def test_hf_round_trip_in_shards(config, dtype, tmp_path):
    model = noisy(config, dtype)
    save_hf(model, tmp_path, tokenizer=ByteTokenizer(), max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = load_model(tmp_path)
    assert_same(loaded.model, model)
    assert loaded.generation.eos_token_ids == (256,)
    save_hf(model, tmp_path)  # one file now; the shards must not stay behind
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert_same(load_model(tmp_path).model, model)


@both
def test_load_in_another_dtype(config, tmp_path):
    save_hf(noisy(config), tmp_path)
    loaded = load_model(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(model_params(loaded.model))} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.tokenizer is None


def test_gpt2_of_the_bare_model_with_stored_masks_and_a_tied_head(tmp_path):
    model = noisy(GPT2_CONFIG)
    save_hf(model, tmp_path)
    tensors = {
        k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path).model, model)


def test_eos_ids_come_from_the_generation_config(tmp_path):
    save_hf(noisy(GPT2_CONFIG), tmp_path, tokenizer=ByteTokenizer())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert load_model(tmp_path).generation.eos_token_ids == (3, 4)


@pytest.fixture
def hf_folder(tmp_path):
    save_hf(noisy(LLAMA_CONFIG), tmp_path, max_shard_bytes=4000)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"vocab_size": 41}, "embed_tokens"),
        ({"num_hidden_layers": 3}, r"layers\.2.*missing"),
        ({"num_hidden_layers": 1}, r"does not have.*layers\.1"),
        ({"num_attention_heads": 3}, "num_kv_heads"),
    ],
)
def test_hf_folders_that_do_not_fit_are_refused_by_name(hf_folder, changes, named):
    edit_config(hf_folder, **changes)
    with pytest.raises(ValueError, match=named):
        load_model(hf_folder)


def test_broken_hf_folders(hf_folder, tmp_path):
    shard = sorted(hf_folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name}.*broken"):
        load_model(hf_folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(hf_folder)
    (hf_folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(hf_folder)
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json.*JSON"):
        load_model(hf_folder)
    (hf_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(hf_folder)


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\.gguf"):
        load_model(tmp_path / "model.bin")


# --- our checkpoints --------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for step in (5, 12):
        save_checkpoint(
            folder,
            noisy(GPT2_CONFIG, jnp.float32 if step == 12 else jnp.bfloat16),
            ByteTokenizer(),
            step=step,
        )
    return folder


def test_checkpoint_round_trip(checkpoint):
    assert steps_of(checkpoint) == [5, 12]
    loaded = load_model(checkpoint)  # the latest
    assert_same(loaded.model, noisy(GPT2_CONFIG))
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert loaded.generation.eos_token_ids == (256,)
    assert_same(load_checkpoint(checkpoint, step=5).model, noisy(GPT2_CONFIG, jnp.bfloat16))
    cast = load_model(checkpoint, dtype=jnp.bfloat16)
    assert_same(cast.model, noisy(GPT2_CONFIG, jnp.bfloat16))


def test_metadata_round_trip(tmp_path):
    write_metadata(tmp_path, LLAMA_CONFIG, get_tokenizer("bytes"))
    config, tokenizer = read_metadata(tmp_path)
    assert config == LLAMA_CONFIG
    assert isinstance(tokenizer, ByteTokenizer)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_model(tmp_path)


def test_broken_checkpoints(checkpoint, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    with pytest.raises(FileNotFoundError, match=r"step 7.*\[5, 12\]"):
        load_checkpoint(folder, step=7)
    for path in (folder / "checkpoints" / "12" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 300:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="broken checkpoint"):
        load_model(folder)
    edit_config(folder, num_layers=3)
    with pytest.raises(ValueError, match="params: 12 missing"):
        load_checkpoint(folder, step=5)
    edit_config(folder, num_layerz=3)
    with pytest.raises(ValueError, match="num_layerz"):
        load_model(folder)


# --- .gguf --------------------------------------------------------------


def write_gguf(path, model, *, architecture="llama", tensors=None, **changes):
    """A file as llama.cpp's converter writes it, Q and K rows in its order."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    tokens = ["<|endoftext|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789", "ab", "abc"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 38])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for name, array in (tensors or gguf_tensors(model)).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model, folder_names=None):
    from jaxattn.models.llama_hf import params_to_hf
    from jaxattn.weights.gguf import BLOCK_TENSOR_NAMES, TENSOR_NAMES

    tensors = {}
    for name, array in params_to_hf(jax.tree.map(np.asarray, model_params(model)), model.config).items():
        array = np.ascontiguousarray(array)
        if name in TENSOR_NAMES:
            tensors[TENSOR_NAMES[name]] = array
            continue
        _, _, layer, *part, leaf = name.split(".")
        if part[-1] in ("q_proj", "k_proj"):  # llama.cpp's LlamaModel.permute
            heads = array.shape[0] // model.config.head_dim
            shape = (heads, 2, model.config.head_dim // 2, array.shape[1])
            array = np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2).reshape(array.shape))
        tensors[f"blk.{layer}.{BLOCK_TENSOR_NAMES['.'.join(part)]}.{leaf}"] = array
    return tensors


GGUF_CONFIG = LlamaConfig(**SIZES, num_kv_heads=2, mlp_dim=24, rope_theta=1234.0, norm_eps=2**-10)


def test_gguf_gives_back_the_model_and_its_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, noisy(GGUF_CONFIG))
    loaded = load_model(path)
    assert_same(loaded.model, noisy(GGUF_CONFIG))
    tokenizer = loaded.tokenizer
    assert tokenizer.encode("abc12") == [0, 39, 29, 30]  # BOS, one merged word, digits one by one
    assert tokenizer.encode("abc<|im_end|>", add_special_tokens=False) == [39, 1]
    assert (tokenizer.bos_token_id, loaded.generation.eos_token_ids) == (0, (1,))
    assert get_tokenizer(path).encode("abc12") == tokenizer.encode("abc12")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"tokenizer": "llama"}, "tokenizer 'llama'"),
        ({"pre": "chatglm"}, "chatglm"),
    ],
)
def test_unknown_gguf_kinds_are_named(tmp_path, changes, named):
    path = tmp_path / "model.gguf"
    write_gguf(path, noisy(GGUF_CONFIG), **changes)
    with pytest.raises(ValueError, match=named):
        load_model(path)


def test_broken_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = gguf_tensors(noisy(GGUF_CONFIG))
    write_gguf(path, noisy(GGUF_CONFIG), tensors=tensors | {"rope_freqs.weight": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="rope_freqs"):
        load_model(path)
    del tensors["blk.1.ffn_up.weight"]
    write_gguf(path, noisy(GGUF_CONFIG), tensors=tensors)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*missing"):
        load_model(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a model at all", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="broken"):
            load_model(path)
