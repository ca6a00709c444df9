"""Writes tests/golden/tiny: small random models and what transformers computes with them (see README.md)."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

FOLDER = Path(__file__).parent / "tiny"
VOCAB, BATCH, LENGTH = 96, 2, 40

GPT2 = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # small, so that every branch of the scaling is met
}
CONFIGS = {
    "gpt2_tied": GPT2Config(**GPT2),
    "gpt2_untied": GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=80, layer_norm_epsilon=1e-3),
    "llama_gqa_untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama_mqa_tied_biased": LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 1}, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama_theta_head_dim": LlamaConfig(
        **LLAMA,
        head_dim=16,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "llama_linear_rope": LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama_llama3_rope": LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE),
}


@torch.no_grad()
def make(name: str, config: object, seed: int) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for (
        parameter
    ) in model.parameters():  # large enough that every weight moves the logits; no bias stays zero
        parameter.add_(torch.randn_like(parameter) * 0.15)
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    logits = model(tokens).logits
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "expected.safetensors")
    print(f"{name}: logits {logits.min():.2f} to {logits.max():.2f}")


if __name__ == "__main__":
    for seed, (name, config) in enumerate(CONFIGS.items()):
        make(name, config, seed)
