"""What is asked about a model, read once: its shape, its parameters, and what one rank of a TP group holds of it.

Preflight reads the facts and hands them on to the checks, the planner and the notebook, so that no two of them can
understand a config differently.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.model.heads import Heads, mean, of_layers
from tp2d_helpers.model.norms import Norms
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.ropes import check_rope
from tp2d_helpers.model.shard import AllReduces, Matmul, Shard
from tp2d_helpers.model.sharding import meta_model
from tp2d_helpers.model.text_part import KEY_MAPPING, is_part, text_part
from tp2d_helpers.speed.layers import decoder_layers
from tp2d_helpers.speed.mixtures import routers

# What configs call the experts of a layer, and those that a token meets.
EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")


def load_config(model_name: str, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """Read the config of what is trained: where the text model is a part, that part's.

    Raises:
        ConfigError: if it is neither local nor in the hub's reach or cache.
    """
    return text_part(*read_config(model_name, trust_remote_code))


def loading_arguments(model_name: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """What `from_pretrained` must be told to load the text model alone; nothing where it is no part."""
    whole, given = read_config(model_name, trust_remote_code)
    return dict(config=text_part(whole, given), key_mapping=KEY_MAPPING) if is_part(whole) else {}


def read_config(model_name: str, trust_remote_code: bool) -> tuple[transformers.PretrainedConfig, dict[str, Any]]:
    """(the config of the whole model, the fields in its config.json)."""
    try:
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
        given, _ = config.get_config_dict(model_name)
        parts = is_part(config)
        check_rope(config.text_config if parts else config, given.get("text_config", {}) if parts else given)
        return config, given
    except ConfigError as error:
        raise ConfigError(f"model_name = {model_name!r}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"model_name = {model_name!r}: its config can't be loaded ({reason(error)}). "
            'Without a way to the hub, take "demo" or the path of a local folder.'
        ) from error


@dataclass(frozen=True)
class ModelFacts:
    """A decoder's shape and parameters. Where the text model is a part, that part's: it alone is trained.

    Attributes:
        config: the trained model's, as `transformers` reads it.
        part_of: the `model_type` of the whole, where the text model is a part; else empty.
        layers, hidden, heads, key_value_heads, head_dim, vocabulary: its shape. Of what differs between layers, the
            mean.
        positions: the longest sequence that it knows; None without a limit.
    """

    config: transformers.PretrainedConfig
    part_of: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    positions: int | None

    @classmethod
    def read(cls, model_name: str, trust_remote_code: bool = False) -> ModelFacts:
        """Of a model by its name. Raises `ConfigError` if its config can't be loaded."""
        return cls.of(*read_config(model_name, trust_remote_code))

    @classmethod
    def of_shape(cls, shape: dict[str, Any]) -> ModelFacts:
        """Of a model that is nowhere: `model_type` and fields of its config, as in `demo.SHAPES`."""
        return cls.of(AutoConfig.for_model(**shape), shape)

    @classmethod
    def of(cls, whole: transformers.PretrainedConfig, given: dict[str, Any] | None = None) -> ModelFacts:
        """Of a config, and its fields in config.json (see `text_part`).

        Raises:
            ConfigError: if it lacks what every decoder has.
        """
        config = text_part(whole, given or {})
        try:
            text = config.get_text_config()
            layers, hidden, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
        except (AttributeError, ValueError) as error:
            raise ConfigError(
                f"model_name: {config.model_type!r} has no config of a decoder of text ({reason(error)})"
            ) from error
        heads, key_value_heads = Heads.of(text).mean
        return cls(
            config=config,
            part_of=whole.model_type if config is not whole else "",
            layers=layers,
            hidden=hidden,
            heads=heads,
            key_value_heads=key_value_heads,
            head_dim=mean(of_layers(text, "head_dim")) or hidden // max(heads, 1),
            vocabulary=vocabulary,
            positions=mean(of_layers(text, "max_position_embeddings")) or None,
        )

    @functools.cached_property
    def meta(self) -> torch.nn.Module:
        """The model without storage. Raises `ConfigError` if `AutoModelForCausalLM` can't build it."""
        return meta_model(self.config)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        head = self.meta.get_output_embeddings()
        return head is not None and head.weight is self.meta.get_input_embeddings().weight

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of the whole model; tied weights count once."""
        return sum(parameter.numel() for parameter in self.meta.parameters())

    @functools.cached_property
    def experts(self) -> tuple[int, int]:
        """(experts of a mixture's layer, those that a token meets), without the shared ones; (0, 0) of other models."""
        text = self.config.get_text_config()
        experts, per_token = (
            next((value for name in names if (value := getattr(text, name, None))), 0) for names in (EXPERTS, PER_TOKEN)
        )
        return experts, per_token or experts

    def _matmuls(self, plan: Plan) -> Iterator[tuple[torch.nn.Module, Matmul]]:
        """Every matrix of the model with its module. Lookups, norms and what is per head are none."""
        (experts, per_token), frozen = self.experts, routers(self.meta)  # which LoRA leaves as they are
        for name, module in self.meta.named_modules():
            if isinstance(module, torch.nn.Embedding) or "norm" in type(module).__name__.lower():
                continue
            for own, weight in module.named_parameters(recurse=False):
                full, style = f"{name}.{own}", plan.styles.get(name, "")
                *stack, inputs, outputs = plan.shape(full, weight.shape) if weight.ndim > 1 else (0, 0, 0)
                if not stack and not own.endswith("bias"):
                    linear = isinstance(module, torch.nn.Linear | Conv1D) and module not in frozen
                    yield module, Matmul(full, inputs, outputs, style, linear)
                elif experts and stack == [experts]:
                    yield module, Matmul(full, inputs, outputs, style, False, experts, per_token)

    @functools.cached_property
    def matmul_parameters(self) -> int:
        """Parameters that each token is multiplied by: of all matrices, whatever their class, but lookups.

        An embedding is a lookup unless it is the output head, too. Of the experts of a mixture, stacked in tensors
        [experts, …], a token meets `num_experts_per_tok`, and all that are shared.
        """
        return sum(matmul.active for _, matmul in self._matmuls(Plan(1)))

    def flops_per_token(self, seq_length: int, adapters: int = 0) -> float:
        """Floating-point operations of a training step per token: 6·N + 6·L·a·s.

        N is `matmul_parameters`, L the layers, a = heads · head_dim, s the sequence length. 2 of the 6 are the forward
        pass, 4 the backward pass. The second term is causal attention, 12·L·a·s halved by the mask (Chowdhery et al.
        2022, PaLM, appendix B, without the halving). Sliding windows are counted as full attention. Recomputed
        activations don't count.

        Args:
            adapters: parameters of LoRA's. With any, the first term is 4·N + 6·adapters: no gradients of N are made.
        """
        matmuls = 4 * self.matmul_parameters + 6 * adapters if adapters else 6 * self.matmul_parameters
        return matmuls + 6 * self.layers * self.heads * self.head_dim * seq_length

    @functools.cached_property
    def norms(self) -> Norms:
        """What the norms of hidden states keep for the backward pass."""
        return Norms.of(self.meta, self.hidden)

    @functools.cached_property
    def joined(self) -> bool:
        """Whether one matrix makes queries, keys and values, of which the first two are rotated."""
        size = (self.heads + 2 * self.key_value_heads) * self.head_dim
        one = any("att" in m.name and {m.inputs, m.outputs} == {size, self.hidden} for _, m in self._matmuls(Plan(1)))
        return one and any("rotary" in type(module).__name__.lower() for module in self.meta.modules())

    @functools.cached_property
    def windows(self) -> tuple[float, int]:
        """(share of the layers whose attention sees a window, tokens in it); (0, 0) of other models."""
        text = self.config.get_text_config()
        kinds, window = getattr(text, "layer_types", None) or [], getattr(text, "sliding_window", None) or 0
        share = kinds.count("sliding_attention") / len(kinds) if kinds else 0
        return (share, window) if share and window else (0, 0)

    def shard(self, tp_size: int) -> Shard:
        """What each rank of a TP group holds. Raises `ConfigError` if the model can't be divided so.

        That is more than 1/tp_size of the parameters: norms stay whole, and so does the embedding of an untied model,
        which is 525 of Llama-3-8B's 8,030 million.
        """
        plan, experts = Plan.of(self.meta, tp_size), self.experts
        inside = {id(module) for layer in decoder_layers(self.meta) for module in layer.modules()}
        return Shard(
            layers=self.layers,
            hidden=self.hidden,
            query=self.heads // tp_size * self.head_dim,
            key_value=max(1, self.key_value_heads // tp_size) * self.head_dim,
            heads=self.heads // tp_size,
            vocabulary=self.vocabulary // tp_size,
            parameters=sum(shape.numel() for shape in plan.shapes(self.meta).values()),
            tied=self.tied,
            normed_heads=any(name.endswith(("q_norm", "k_norm")) for name, _ in self.meta.named_modules()),
            layer_matmuls=tuple(matmul for module, matmul in self._matmuls(plan) if id(module) in inside),
            all_reduces=AllReduces.of(plan, experts[1]),
            norms=self.norms,
            joined=self.joined,
            masked=self.windows[0],
            window=self.windows[1],
        )
