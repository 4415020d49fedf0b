"""An export's tokenizer: the files that came, where nothing changed them, for transformers 4 and 5."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from tp2d_helpers.checkpoint.files import read_json, write_json
from tp2d_helpers.data.tokenizer import own_code, sample_tokens, tokenizer_file

TEMPLATE = "chat_template.jinja"
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE),
    *("tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt"),
)
PLAIN = "PreTrainedTokenizerFast"  # the same class in both versions; 5 writes "TokenizersBackend", which 4 lacks


def write_tokenizer(
    folder: Path,
    model_name: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    template: str | None,
    trust_remote_code: bool = False,
) -> None:
    """Write the tokenizer's files: of a model's own class as `save_pretrained` does, of others as they came.

    What `save_pretrained` writes of these is a rewriting: without `add_bos_token`, and for some classes with names that
    transformers 4 can't read.

    Args:
        model_name: what it came with.
        template: the chat template that was trained by, if not its own.
    """
    came = tokenizer.chat_template
    tokenizer.chat_template = template or came
    tokenizer.save_pretrained(folder)
    if own_code(type(tokenizer)):
        return
    changed = tokenizer.chat_template != came
    for name in FILES:
        if (path := tokenizer_file(model_name, name)) and not (changed and name == TEMPLATE):
            shutil.copyfile(path, folder / name)
    said = read_json(folder / "tokenizer_config.json")
    if "chat_template" in said and not changed and not tokenizer_file(model_name, TEMPLATE):
        (folder / TEMPLATE).unlink(missing_ok=True)
    _for_both(folder, said, changed)
    if _as_it_was(folder, Path(model_name), tokenizer):
        return

    def other_tokens() -> bool:
        """Whether who loads the export gets others than were trained on."""
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return sample_tokens(found) != sample_tokens(tokenizer)

    if other_tokens():
        write_json(folder / "tokenizer_config.json", read_json(folder / "tokenizer_config.json") | _class(PLAIN))
    if other_tokens():
        warnings.warn(
            f"AutoTokenizer of transformers {transformers.__version__} gives other tokens than the export's "
            f"tokenizer.json, which was trained by: load it by {PLAIN}.from_pretrained",
            stacklevel=2,
        )


def _as_it_was(folder: Path, model: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Whether `AutoTokenizer` sees no other thing in an export than in the folder that it loaded from, and was right.

    It takes a second for 150,000 tokens. By the hub's names it makes exceptions, so that what it makes of an id is
    no sign.
    """
    before, now = read_json(model / "tokenizer_config.json"), read_json(folder / "tokenizer_config.json")
    types = [read_json(place / "config.json").get("model_type") for place in (model, folder)]
    same = {name for name in {*before, *now} if before.get(name) != now.get(name)} <= {"chat_template", "auto_map"}
    return model.is_dir() and same and types[0] == types[1] and not hasattr(tokenizer, "remark")


def _for_both(folder: Path, said: dict, changed: bool) -> None:
    """Let a tokenizer_config.json say what is true of the export, by names that both versions know."""
    now = {name: value for name, value in said.items() if name != "auto_map"}  # of code that isn't here
    if changed:  # the file has it
        now.pop("chat_template", None)
    if now.get("tokenizer_class") == "TokenizersBackend":
        now |= _class(PLAIN)
    if isinstance(now.get("extra_special_tokens"), list):  # version 4's are a dict, and these are called
        now["additional_special_tokens"] = now.pop("extra_special_tokens")
    if now != said:
        write_json(folder / "tokenizer_config.json", now)


def _class(name: str) -> dict[str, str]:
    return {"tokenizer_class": name}
