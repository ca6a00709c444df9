"""The attention calls that flash_attention.py times: shapes, masks, and the FLOPs that they need."""

import dataclasses
import re

import numpy as np

from jaxattn import BlockMask
from pallas_kernels.flash_attention.arguments import MAX_HEAD_DIM

TOKENS, WIDTH = 16384, 2048  # tokens, and N x H, of the rows of the main table
NUM_DOCUMENTS = 8  # in a row of packed documents

# Recorded on an H200 under torch 2.11, not measured by this script: TFLOP/s forward, and forward + backward.
FLASH_ATTENTION_4_SOURCE = "flash-attn-4 4.0.0b36 (Hopper kernels), CUDA events, its launch cost included"
FLEX_ATTENTION_SOURCE = "torch flex_attention, compiled; densities 1.0, 0.51, 0.26, 0.14"
FLEX_ATTENTION = {1.0: (413, 406), 0.5: (398, 388), 0.25: (377, 359), 0.125: (351, 348)}  # density: rates
FLASH_ATTENTION_4 = {  # (H, causal, T): rates
    (128, True, 1024): (410, 370),
    (128, True, 4096): (576, 534),
    (128, True, 16384): (645, 612),
    (128, False, 1024): (551, 490),
    (128, False, 4096): (644, 600),
    (64, True, 1024): (262, 299),
    (64, True, 4096): (442, 454),
    (64, True, 16384): (519, 459),
    (64, False, 1024): (399, 413),
    (64, False, 4096): (505, 505),
    (256, True, 4096): (636, 389),
    (256, True, 16384): (706, 414),
    (256, False, 4096): (703, 429),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One call. The letters are those of the kernels: B, T, S, N, K, H."""

    section: str
    B: int
    T: int
    N: int
    H: int
    S: int = 0  # 0: T
    K: int = 0  # 0: N
    causal: bool = False
    window: int = 0  # keys a query sees, itself the last of them; 0: no limit
    ragged: str = ""  # "lengths": padded rows of random lengths; "segments": packed documents
    density: float = 0.0  # of random 128 x 128 blocks that are visible; 0: no block mask
    dtype: str = "bfloat16"
    deterministic: bool = False

    def __post_init__(self):
        object.__setattr__(self, "S", self.S or self.T)
        object.__setattr__(self, "K", self.K or self.N)

    @property
    def label(self) -> str:
        length = f"T={self.T}" + (f" S={self.S}" if self.S != self.T else "")
        heads = f"{self.N}/{self.K}" if self.K != self.N else f"{self.N}"
        extras = [f"window={self.window}"] if self.window else []
        extras += [self.ragged] if self.ragged else []
        extras += [f"density={self.density}"] if self.density else []
        extras += [] if self.dtype == "bfloat16" else [self.dtype]
        extras += ["deterministic"] if self.deterministic else []
        mask = "causal" if self.causal else "full"
        return " ".join([f"H={self.H}", mask, length, f"B={self.B} N={heads}", *extras])

    @property
    def recorded(self) -> tuple[str, tuple[int, int]] | None:
        """(source, rates) of a peer that cannot be called from here."""
        if self.section == "main":  # the rows of this table
            return FLASH_ATTENTION_4_SOURCE, FLASH_ATTENTION_4[self.H, self.causal, self.T]
        if self.density:
            return FLEX_ATTENTION_SOURCE, FLEX_ATTENTION[self.density]
        return None

    @property
    def block_mask(self) -> BlockMask:
        """Each tile of queries sees its own choice of tiles of keys, the same in every process."""
        return BlockMask.random(self.T, self.S, density=self.density)

    @property
    def visible(self) -> float:
        """Pairs of a query and a key it sees, of one head of the whole batch; T x S / 2 where causal."""
        if self.window:
            return self.B * float(np.minimum(np.arange(self.T) + 1, self.window).sum())
        squares = self.B * self.T * self.S
        if self.ragged:
            squares = float((document_lengths(self).astype(np.float64) ** 2).sum())
        if self.density:
            squares *= self.block_mask.density
        return squares / 2 if self.causal else squares

    @property
    def flops(self) -> float:
        """Of the forward pass: two matrix products over the visible pairs. The backward counts 2.5 times."""
        return 4 * self.visible * self.N * self.H

    @property
    def logits_bytes(self) -> float:
        """Of the logits that standard attention stores, in fp32."""
        return 4 * self.B * self.N * self.T * self.S


def document_lengths(row: Row) -> np.ndarray:
    """i32[B, documents]: random, the same in every process. One a row where rows are padded."""
    rng = np.random.default_rng(0)
    if row.ragged == "lengths":
        return rng.integers(row.T // 8, row.T + 1, (row.B, 1)).astype(np.int32)
    cuts = [np.sort(rng.choice(row.T - 1, NUM_DOCUMENTS - 1, replace=False) + 1) for _ in range(row.B)]
    edges = [np.concatenate([[0], cut, [row.T]]) for cut in cuts]
    return np.diff(np.stack(edges)).astype(np.int32)


def _main(head_dim: int, causal: bool, length: int, section: str = "main", **options) -> Row:
    shape = {"B": TOKENS // length, "T": length, "N": WIDTH // head_dim, "H": head_dim}
    return Row(section, **shape, causal=causal, **options)


MAIN_ROWS = [
    _main(*key) for key in sorted(FLASH_ATTENTION_4, key=lambda key: (key[0] == 256, -key[0], not key[1]))
]
OTHER_ROWS = [
    *(_main(head_dim, True, length, "lengths") for head_dim in (128, 64) for length in (2048, 8192)),
    *(Row("head dim", B=4, T=4096, N=20, H=96, causal=causal) for causal in (True, False)),
    *(Row("grouped heads", B=4, T=4096, N=32, K=kv_heads, H=128, causal=True) for kv_heads in (8, 4)),
    Row("cross", B=8, T=512, S=8192, N=16, H=128),
    Row("window", B=1, T=16384, N=16, H=128, causal=True, window=1024),
    Row("ragged", B=8, T=4096, N=16, H=128, causal=True, ragged="lengths"),
    Row("ragged", B=2, T=8192, N=16, H=128, causal=True, ragged="segments"),
    Row("block sparse", B=2, T=8192, N=16, H=128),
    *(Row("block sparse", B=2, T=8192, N=16, H=128, density=density) for density in FLEX_ATTENTION),
    Row("fp16", B=4, T=4096, N=16, H=128, causal=True, dtype="float16"),
    Row("fp16", B=4, T=4096, N=32, H=64, causal=True, dtype="float16"),
    Row("float32", B=4, T=4096, N=16, H=128, causal=True, dtype="float32"),
    Row("float32", B=2, T=4096, N=32, H=64, causal=True, dtype="float32"),
    *(Row("small", B=1, T=length, N=8, H=64, causal=True) for length in (128, 256, 512)),
    Row("small", B=1, T=512, N=4, H=128),
    # Lengths and head dims that fill no tiles, and too few blocks to fill a GPU evenly.
    Row("uneven", B=4, T=1500, N=16, H=64),
    Row("uneven", B=16, T=197, N=12, H=64),
    Row("uneven", B=4, T=777, N=16, H=128, causal=True),
    Row("uneven", B=3, T=1337, N=7, H=96),
    Row("uneven", B=4, T=2048, N=32, H=48, causal=True),
    Row("uneven", B=8, T=1024, N=16, H=72),
    Row("uneven", B=4, T=2048, N=32, H=80, causal=True),
    Row("uneven", B=2, T=2048, N=32, H=112, causal=True),
    *(Row("one query", B=batch, T=1, S=4096, N=32, K=8, H=128) for batch in (1, 32)),
    Row("few blocks", B=1, T=4096, N=8, H=128),
    Row("few blocks", B=2, T=2048, N=8, H=128, causal=True),
    Row("few blocks", B=1, T=768, N=25, H=64, causal=True),
    Row("few blocks", B=4, T=2048, N=32, K=1, H=128, causal=True),
    Row("few blocks", B=1, T=1024, N=32, K=8, H=128, causal=True),
    *(
        _main(*key, "deterministic", deterministic=True)
        for key in ((128, True, 4096), (128, True, 16384), (128, False, 4096), (64, True, 4096))
    ),
]
ROWS = MAIN_ROWS + OTHER_ROWS


def parse_row(text: str) -> Row:
    """A row from the command line, such as "B=4 T=4096 N=32 K=8 H=128 causal window=1024 float16"."""
    fields: dict = {}
    for word in re.split(r"[ ,]+", text.strip()):
        name, _, value = word.partition("=")
        if name in ("B", "T", "S", "N", "K", "H", "window") and value.isdecimal():
            fields[name] = int(value)
        elif name == "density" and value in map(str, FLEX_ATTENTION):
            fields[name] = float(value)
        elif word in ("causal", "deterministic"):
            fields[word] = True
        elif word in ("lengths", "segments"):
            fields["ragged"] = word
        elif word in ("bfloat16", "float16", "float32"):
            fields["dtype"] = word
        else:
            raise ValueError(
                f"--shape: {word!r} is none of B= T= S= N= K= H= window= (each with a number), density= "
                f"({', '.join(map(str, FLEX_ATTENTION))}), causal, lengths, segments, bfloat16, float16, "
                "float32, deterministic"
            )
    if missing := [name for name in "BTNH" if not fields.get(name)]:
        raise ValueError(f"--shape: {', '.join(missing)} must be given and be at least 1, got {text!r}")
    if fields["H"] > MAX_HEAD_DIM:
        raise ValueError(f"--shape: H must be at most {MAX_HEAD_DIM}, got {text!r}")
    row = Row("given", **fields)
    if row.N % row.K:
        raise ValueError(f"--shape: N must be a multiple of K, got {text!r}")
    return row
