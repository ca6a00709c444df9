"""Writes smollm2_greedy.json: SmolLM2's greedy continuations by transformers (see README.md)."""

import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent / "smollm2_greedy.json"
MAX_NEW_TOKENS = 24
PROMPTS = [  # is_chat, prompt
    (True, "What is the capital of France?"),
    (True, "Name three primary colors."),
    (True, "What is 12 + 30?"),
    (True, "Write a haiku about the sea."),
    (True, "Translate 'good morning' into Spanish."),
    (True, "Who wrote Romeo and Juliet?"),
    (True, "What is the largest animal on Earth?"),
    (True, "Give me a synonym for 'happy'."),
    (
        True,
        "List the planets of the solar system in order from the Sun, please, "
        "and say which of them is largest.",
    ),
    (True, "What year did the Second World War end?"),
    (True, "Is a tomato a fruit or a vegetable?"),
    (True, "Write a Python function that adds two numbers."),
    (True, "How many days are there in a leap year?"),
    (True, "What color is a ripe banana?"),
    (False, "Once upon a time, in a village by the sea,"),
    (False, "The three laws of thermodynamics state that"),
    (False, "def fibonacci(n):\n    "),
    (False, "In 1969, Neil Armstrong"),
    (False, "Water boils at 100"),
    (False, "To make a good cup of tea, you should first"),
]


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The file's vocabulary with SmolLM's pre-tokenizer: digits one by one, then GPT-2's pattern."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


@torch.no_grad()
def continue_greedily(model: torch.nn.Module, ids: list[int], eos: int) -> tuple[list[int], float]:
    tokens, past, greedy, gap = torch.tensor([ids]), None, [], float("inf")
    while len(greedy) < MAX_NEW_TOKENS and eos not in greedy:
        output = model(tokens, past_key_values=past, use_cache=True)
        best = output.logits[0, -1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        greedy.append(int(best.indices[0]))
        tokens, past = torch.tensor([greedy[-1:]]), output.past_key_values
    return greedy, gap


def main(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    eos, records = tokenizer.eos_token_id, []
    for is_chat, prompt in PROMPTS:
        text = prompt
        if is_chat:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        greedy, gap = continue_greedily(model, ids, eos)
        record = {"prompt": prompt, "is_chat": is_chat, "prompt_ids": ids, "greedy_ids": greedy}
        record["text"] = tokenizer.decode(greedy, skip_special_tokens=True)
        record["finish_reason"] = "stop" if greedy[-1] == eos else "length"
        record["smallest_gap"] = round(gap, 5)
        records.append(record)
        print(f"{gap:.4f} {len(ids):3} {record['text']!r}")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    golden = {
        "made_with": {**versions, "python": platform.python_version()},
        "model": path.name,
        "max_new_tokens": MAX_NEW_TOKENS,
        "records": records,
    }
    OUT.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
