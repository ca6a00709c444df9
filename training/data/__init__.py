"""Text to token files, and token files to batches."""

from training.data.batches import Batch, BatchLoader, evaluation_batches
from training.data.prepare import DataError, prepare
from training.data.tokens import TokenFiles, open_tokens

__all__ = ["Batch", "BatchLoader", "DataError", "TokenFiles", "evaluation_batches", "open_tokens", "prepare"]
