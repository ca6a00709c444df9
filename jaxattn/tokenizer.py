"""Text to token ids and back: bytes, and byte-pair encodings from their tables."""

import abc
import codecs
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE

__all__ = ["BPETokenizer", "ByteTokenizer", "Detokenizer", "Tokenizer", "byte_level_bpe"]

END_OF_TEXT = "<|endoftext|>"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

type Message = Mapping[str, Any]  # {"role": ..., "content": ...}


class Tokenizer(abc.ABC):
    """What serving and training ask of a tokenizer."""

    vocab_size: int
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    chat_template: str | None = None

    @abc.abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; with add_special_tokens also those the model expects around it (often BOS)."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer(folder)` reads."""

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes one token stands for (none for special tokens); None where a token alone has no bytes."""
        return None

    def token_text(self, token: int | None) -> str:
        """How a special token is written; "" for None."""
        return "" if token is None else self.decode([token], skip_special_tokens=False)

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the one text the model was trained on, ready for
        `encode(add_special_tokens=False)`.

        messages: dicts of role ("system", "user", "assistant") and content. The template is the Jinja
        program that came with the weights, run in a sandbox. ValueError where there is none or it refuses
        the messages.
        """
        if self.chat_template is None:
            raise ValueError("chat_template: this tokenizer has none; give the prompt as plain text")
        import jinja2

        try:
            return _compile_template(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.token_text(self.bos_token_id),
                eos_token=self.token_text(self.eos_token_id),
                **variables,
            )
        except (jinja2.TemplateError, KeyError, TypeError) as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from error


@functools.lru_cache(maxsize=16)
def _compile_template(source: str) -> Any:
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


class ByteTokenizer(Tokenizer):
    """256 bytes and <|endoftext|> (id 256): no vocabulary to learn, for models that learn fast and small."""

    vocab_size = 257
    eos_token_id = 256

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        pieces = (
            self.token_bytes(token) or (b"" if skip_special_tokens else END_OF_TEXT.encode()) for token in ids
        )
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def save(self, folder: str | Path) -> None:
        _write_json(Path(folder) / "tokenizer_config.json", {"tokenizer_class": "ByteTokenizer"})


class BPETokenizer(Tokenizer):
    """Byte-pair encoding run by the `tokenizers` library (Sennrich et al. 2016; Radford et al. 2019)."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        chat_template: str | None = None,
    ):
        self.backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes | None:
        return None if self._pieces is None else self._pieces.get(int(token), b"")

    @functools.cached_property
    def _pieces(self) -> dict[int, bytes] | None:
        """The bytes of every token, where the decoder is byte-level."""
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        to_byte = {char: byte for byte, char in _byte_alphabet().items()}
        added = self.backend.get_added_tokens_decoder()
        pieces = {token: b"" if t.special else t.content.encode() for token, t in added.items()}
        for text, token in self.backend.get_vocab(with_added_tokens=False).items():
            pieces.setdefault(token, bytes(to_byte[char] for char in text if char in to_byte))
        return pieces

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, token in (("eos_token", self.eos_token_id), ("bos_token", self.bos_token_id)):
            if token is not None:
                settings[name] = self.backend.id_to_token(token)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        _write_json(folder / "tokenizer_config.json", settings)


@functools.cache
def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else a letter from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Detokenizer:
    """Text from tokens one by one, for streaming and stop strings; half a UTF-8 character waits for its rest.

    The pieces of `push` and the one of `flush` add up to `tokenizer.decode(all tokens)`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # only where tokens have no bytes of their own:
        self._shown = 0  # ids[:shown] are in text already given out
        self._context = 0  # ids[context:shown] are decoded again with what follows, for the spaces between

    def push(self, token: int) -> str:
        piece = self._tokenizer.token_bytes(token)
        if piece is not None:
            return self._utf8.decode(piece)
        self._ids.append(int(token))
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True) + self._pending()
        self._context = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(known) :]


# --- byte-level BPE from its tables -------------------------------------------------------------------------


def _gpt2_pre_tokenizer() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_pre_tokenizer() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_pre_tokenizer()])


def _llama3_pre_tokenizer() -> Any:
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is cut before merging, by llama.cpp's names (`tokenizer.ggml.pre`).
PRE_TOKENIZERS = {
    "gpt-2": _gpt2_pre_tokenizer,
    "smollm": _smollm_pre_tokenizer,
    "llama-bpe": _llama3_pre_tokenizer,
}


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    pre: str = "gpt-2",
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    add_bos: bool = False,
    chat_template: str | None = None,
) -> BPETokenizer:
    """A byte-level BPE tokenizer from its tables; `pre` is a key of PRE_TOKENIZERS."""
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"pre={pre!r}: this pre-tokenizer is not known, only {sorted(PRE_TOKENIZERS)}")
    # Llama 3 looks whole words up before it merges
    backend = tokenizers.Tokenizer(
        BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=pre == "llama-bpe")
    )
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    if add_bos and bos_token_id is not None:
        bos = backend.id_to_token(bos_token_id)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_token_id)]
        )
    return BPETokenizer(
        backend, eos_token_id=eos_token_id, bos_token_id=bos_token_id, chat_template=chat_template
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
