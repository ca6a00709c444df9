"""Tokenizers: ids against known ones, text back and forth, streaming, chat templates, files."""

import json

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from jaxattn.tokenizer import BPETokenizer, Detokenizer, byte_level_bpe
from jaxattn.tokenizer_files import get_tokenizer, load_tokenizer

TEXTS = ["", "Hello, world!", "  spaces\n\nand\ttabs ", "naïve café — 東京 🙂🏽", "x\u0000y", "1984 and 2001"]


@pytest.fixture(scope="module")
def gpt2():
    return get_tokenizer("gpt2")


@pytest.fixture(scope="module", params=["bytes", "gpt2"])
def tokenizer(request):
    return get_tokenizer(request.param)


def test_gpt2_ids_are_openais(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("The quick brown fox, 1984!") == [464, 2068, 7586, 21831, 11, 12844, 0]
    assert gpt2.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert gpt2.eos_token_id == gpt2.bos_token_id == 50256


def test_bytes():
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("é<|endoftext|>")[:3] == [0xC3, 0xA9, ord("<")]
    assert tokenizer.decode([104, 105, 256, 0xFF]) == "hi\ufffd"
    assert tokenizer.decode([104, 256], skip_special_tokens=False) == "h<|endoftext|>"


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_save_and_load(tokenizer, text, tmp_path):
    tokenizer.chat_template = "{{ messages[0].content }}" if tokenizer.vocab_size > 257 else None
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(text) == tokenizer.encode(text)
    for name in ("eos_token_id", "bos_token_id", "chat_template", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_adds_up_and_never_shows_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_of_broken_utf8_equals_decode():
    tokenizer = get_tokenizer("bytes")
    ids = [0xE6, 0x9D, 104, 0xFF, 0xC3, 256]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


def test_streaming_where_tokens_have_no_bytes_of_their_own():
    """LLaMA 2's kind: words begin with a mark that decodes to a space, but not at the start of a text."""
    vocab = {"▁Hello": 0, "▁world": 1, "!": 2, "<0xC3>": 3, "<0xA9>": 4, "<unk>": 5}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer = BPETokenizer(backend)
    assert tokenizer.token_bytes(0) is None
    ids = [0, 1, 3, 4, 2]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert pieces == ["Hello", " world", "", "é", "!"]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("pre", "digits"), [("gpt-2", ["2024"]), ("smollm", ["2", "0", "2", "4"]), ("llama-bpe", ["202", "4"])]
)
def test_pre_tokenizers_cut_digits_as_llama_cpp_does(pre, digits):
    backend = byte_level_bpe({"a": 0}, [], pre=pre, special_tokens=()).backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("2024")] == digits
    with pytest.raises(ValueError, match="pre='bert'"):
        byte_level_bpe({"a": 0}, [], pre="bert")


def test_bos_is_added_only_where_special_tokens_are():
    vocab = {"<s>": 0, "a": 1, "b": 2}
    options = {"special_tokens": ["<s>"], "bos_token_id": 0}
    with_bos = byte_level_bpe(vocab, [], **options, add_bos=True)
    assert with_bos.encode("ab") == [0, 1, 2]
    assert with_bos.encode("ab", add_special_tokens=False) == [1, 2]
    assert with_bos.decode([0, 1, 2]) == "ab"
    assert byte_level_bpe(vocab, [], **options).encode("ab") == [1, 2]


TEMPLATE = (
    "{% for m in messages %}\n    {% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_template(gpt2):
    gpt2.chat_template = TEMPLATE
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    expected = "<system>Be kind.<|endoftext|>\n<user>Hi<|endoftext|>\n"
    assert gpt2.apply_chat_template(messages) == expected + "<assistant>"
    assert gpt2.apply_chat_template(messages, add_generation_prompt=False) == expected
    with pytest.raises(ValueError, match="no tools"):
        gpt2.apply_chat_template([{"role": "tool", "content": "x"}])
    gpt2.chat_template = "{{ ''.__class__.__mro__ }}"
    with pytest.raises(ValueError, match="refuses"):  # the sandbox
        gpt2.apply_chat_template(messages)
    with pytest.raises(ValueError, match="chat_template"):
        get_tokenizer("bytes").apply_chat_template(messages)


def test_huggingface_files(gpt2, tmp_path):
    """vocab.json and merges.txt, special tokens as dicts, a template in a file of its own."""
    model = json.loads(gpt2.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXTS[3]) == gpt2.encode(TEXTS[3])
    assert tokenizer.eos_token_id == gpt2.encode("!")[0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "x!"


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nope"):
        get_tokenizer("nope")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*broken"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*JSON"):
        get_tokenizer(tmp_path)
