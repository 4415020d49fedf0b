"""Imported by the server that processes are forked from (`grid.py`): what each of them would else do first.

That is a third of the CPU time of a short run on one process.
"""

from __future__ import annotations

import contextlib
import importlib

import transformers.trainer_utils  # noqa: F401 (brings peft along)
from families import TYPES
from transformers import CONFIG_MAPPING

for kind in TYPES.keys() & CONFIG_MAPPING.keys():  # older transformers have fewer
    importlib.import_module(CONFIG_MAPPING[kind].__module__.replace(".configuration_", ".modeling_"))

with contextlib.suppress(ImportError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles 700 patterns of names, for all types
