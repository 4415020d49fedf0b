"""Run in an environment of CTranslate2: python to_ctranslate2.py OUT FOLDER…

Its converter reads each export, and OUT/<name>.pt has the logits of the result by its own engine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from other_version import TOKENS


class Converter(TransformersConverter):
    def load_tokenizer(self, *arguments: Any, **options: Any) -> Any:
        """Its engine wants tokens that not every tokenizer has."""
        tokenizer = super().load_tokenizer(*arguments, **options)
        tokenizer.bos_token, tokenizer.unk_token = tokenizer.eos_token, tokenizer.eos_token
        return tokenizer


if __name__ == "__main__":
    out, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        try:
            made = Converter(str(folder)).convert(str(out / folder.name))
            generator = ctranslate2.Generator(made, compute_type="float32", intra_threads=1)
            ids, lengths = TOKENS.int().numpy(), np.full(len(TOKENS), TOKENS.shape[1], dtype=np.int32)
            logits = generator.forward_batch(*map(ctranslate2.StorageView.from_array, (ids, lengths)))
            found = {"logits": torch.tensor(np.array(logits))}
        except Exception as error:
            found = {"error": f"{type(error).__name__} {error}"}
        torch.save(found, out / f"{folder.name}.pt")
