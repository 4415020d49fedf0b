"""How many heads each layer's attention has, and whether ranks can divide them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PretrainedConfig

from tp2d_helpers.config import ConfigError


def of_layers(text: PretrainedConfig, name: str) -> list[int]:
    """A number of each layer, as a config has it: one that is the same in all, or each layer's own; [] without it."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # transformers' "may vary across layers"
        value = [getattr(layer, name) for layer in text.per_layer_config]
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [number or 0 for number in values]  # None: a layer without attention


def answering_for_all(config: PretrainedConfig) -> PretrainedConfig:
    """A config that answers DeepSpeed, which asks for the key-value heads of all layers, also where these differ.

    The number that it has for most layers will do: the others are divided here (`Plan.own`), or tp_size divides their
    heads as well. It is a copy, since this would be saved with the config.
    """
    if getattr(config, "is_heterogeneous", False):
        config = copy.deepcopy(config)
        config.allow_global_per_layer_attribute_access = True
    return config


def mean(values: list[int]) -> int:
    """Rounded; 0 of none."""
    return round(sum(values) / max(len(values), 1))


@dataclass(frozen=True)
class Heads:
    """Of each layer, or one number for all of them; 0 in models without attention."""

    queries: tuple[int, ...]
    key_values: tuple[int, ...]

    @classmethod
    def of(cls, text: PretrainedConfig) -> Heads:
        """Of a decoder's config. Falcon's `multi_query` means one key-value head."""
        queries = of_layers(text, "num_attention_heads") or [0]
        key_values = of_layers(text, "num_key_value_heads") or of_layers(text, "num_kv_heads") or queries
        if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
            key_values = [1]
        return cls(tuple(queries), tuple(key_values))

    @property
    def mean(self) -> tuple[int, int]:
        """(heads, key-value heads) of a layer, rounded."""
        return mean([*self.queries]), mean([*self.key_values])

    def in_layer(self, layer: int) -> tuple[int, int]:
        """(heads, key-value heads) of one layer, by its index."""
        return self.queries[layer % len(self.queries)], self.key_values[layer % len(self.key_values)]

    def check(self, tp_size: int) -> None:
        """Raise a `ConfigError` if ranks can neither divide the heads nor share key-value heads evenly."""
        if self._fits(tp_size):
            return
        queries, key_values = (" and ".join(map(str, sorted(set(n)))) for n in (self.queries, self.key_values))
        fits = [size for size in range(1, max(self.queries) + 1) if self._fits(size)]
        raise ConfigError(
            f"tp_size = {tp_size}: must divide the {queries} attention heads, and divide the {key_values} "
            f"key-value heads or be a multiple of them; possible are {fits}"
        )

    def _fits(self, size: int) -> bool:
        divided = all(not heads % size for heads in self.queries)
        return divided and all(not heads % size or not size % heads for heads in self.key_values)
