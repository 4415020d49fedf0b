"""Run in an environment of llama.cpp's converter, or of the package that reads its files.

python to_gguf.py write OUT FOLDER…    OUT/<name>.gguf in fp32 of each export, or OUT/<name>.txt with what is wrong
python to_gguf.py read OUT FOLDER…     what is in them: OUT/<name>.pt

It writes as `convert_hf_to_gguf.py --no-mtp` does, but for the tokenizer, which that knows by hashes of published ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import torch
from other_version import TOKENS
from transformers import AutoConfig, AutoModelForCausalLM


class Names:
    """An enumeration, and as they are the names that it lacks: the converter on PyPI is newer than its tables."""

    def __init__(self, known: type) -> None:
        self.known = known

    def __getattr__(self, name: str) -> object:
        return getattr(self.known, name, name)


def write(out: Path, folders: list[Path]) -> None:
    gguf.MODEL_TENSOR, gguf.MODEL_ARCH = Names(gguf.MODEL_TENSOR), Names(gguf.MODEL_ARCH)
    from conversion import ModelBase, ModelType, TextModel, get_model_architecture, get_model_class

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for folder in folders:
        try:
            kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
            kind.set_vocab, kind.no_mtp = TextModel._set_vocab_gpt2, True
            kind(folder, gguf.LlamaFileType.ALL_F32, out / f"{folder.name}.gguf", eager=True).write()
        except Exception as error:
            (out / f"{folder.name}.txt").write_text(f"{type(error).__name__} {error}")


def read(out: Path, folders: list[Path]) -> None:
    """{"numbers"} of all tensors, {"base"} of the rope or None; {"logits"} where transformers reads the type.

    Of a GGUF it takes the weights: the config is the export's, as not all of it is there (windows, partial ropes).
    """
    for folder in folders:
        reader = gguf.GGUFReader(out / f"{folder.name}.gguf")
        base = reader.get_field(f"{reader.get_field('general.architecture').contents()}.rope.freq_base")
        found = {"numbers": sum(int(tensor.n_elements) for tensor in reader.tensors), "base": base and base.contents()}
        try:
            config = AutoConfig.from_pretrained(folder)
            model, info = AutoModelForCausalLM.from_pretrained(
                out, gguf_file=f"{folder.name}.gguf", config=config, dtype=torch.float32, output_loading_info=True
            )
            assert not (wrong := {kind: names for kind, names in info.items() if names}), wrong
            with torch.no_grad():
                found["logits"] = model.eval()(TOKENS, use_cache=False).logits
        except Exception as error:
            found["error"] = f"{type(error).__name__} {error}"
        torch.save(found, out / f"{folder.name}.pt")


if __name__ == "__main__":
    command, out, *folders = sys.argv[1:]
    {"write": write, "read": read}[command](Path(out), [Path(folder) for folder in folders])
