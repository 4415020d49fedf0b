"""One training pass of a model without storage, divided as the run will divide it, before a GPU is taken.

On the meta device a pass costs no memory and about a second, and takes the same way through the model's code: what the
class can't do, or would do otherwise than one process, shows here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from deepspeed.module_inject import layers as autotp_layers
from deepspeed.runtime.tensor_parallel.config import AUTOTP_MODE
from transformers import masking_utils
from transformers.loss.loss_utils import ForCausalLMLoss

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.model.autotp import Leave, Watch, convert, regions, unsummed
from tp2d_helpers.model.decay import undecayed
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.ropes import fix_ropes
from tp2d_helpers.model.sharding import meta_model, random_model
from tp2d_helpers.speed.logits import Logits, computed, delay_logits
from tp2d_helpers.speed.loss import loss_from_logits

SAMPLE = (2, 8)  # samples, tokens
LARGEST = 10**9  # parameters that a model with storage may have, where a pass needs values


@dataclass(frozen=True)
class Rehearsal:
    """What the pass showed. Names are those of the model's weights and modules.

    Attributes:
        own_loss: the class computes its loss without `num_items_in_batch`; the run computes it from the logits.
        summed: whole weights on divided activations, whose gradients must be summed over the TP group.
        blocks: modules whose column-wise layers all take the module's own input.
        divided_dropout: random numbers are drawn for divided activations: each rank of a TP group needs its own.
        whole_logits: why the loss can't take the logits in chunks; "" if it can.
        undecayed: kinds of weights of two or more dimensions that don't decay (`decay.py`).
    """

    own_loss: bool = False
    summed: list[str] = field(default_factory=list)
    blocks: set[str] = field(default_factory=set)
    divided_dropout: bool = False
    whole_logits: str = ""
    undecayed: set[str] = field(default_factory=set)


def rehearse(hf_config: transformers.PretrainedConfig, tp_size: int = 1) -> Rehearsal:
    """What a run at `tp_size` must do for this model to be equal to one process.

    Raises:
        ConfigError: if nothing makes it equal, or the model can't be trained on tokens and labels alone.
    """
    with quiet():
        found = _divided(hf_config, tp_size) if tp_size > 1 else _whole(hf_config)
    if found.own_loss:
        _refuse_routers_loss(hf_config)
    return found


def _whole(hf_config: transformers.PretrainedConfig) -> Rehearsal:
    model = meta_model(hf_config, torch.bfloat16)  # the grouped matmul of experts has no other dtype there
    fix_ropes(model)
    try:
        loss, own_loss, whole_logits = _pass(model)
    except Exception:  # some classes ask for values, which only a model with storage has
        _refuse_routers_loss(hf_config)
        model = _small(hf_config)
        try:
            loss, own_loss, whole_logits = _pass(model)
        except Exception as error:
            raise ConfigError(
                f"model_name: {hf_config.model_type!r} can't be trained on tokens and labels alone ({reason(error)})"
            ) from error
    _check_reach(model, loss)
    return Rehearsal(own_loss, whole_logits=whole_logits, undecayed=undecayed(model, loss))


def _divided(hf_config: transformers.PretrainedConfig, tp_size: int) -> Rehearsal:
    kind = f"model_name: {hf_config.model_type!r} can't be sharded by AutoTP at tp_size {tp_size}: "
    model = meta_model(hf_config, torch.bfloat16)
    fix_ropes(model)
    try:
        plan = Plan.of(model, tp_size)
        convert(model, plan)
        with Watch(model, tp_size) as watch:
            loss, own_loss, whole_logits = _pass(model)
        _check_reach(model, loss)
        summed = unsummed(model, loss, plan)
    except ConfigError:
        raise
    except Exception as error:
        if _whole(hf_config).own_loss:  # what ails it at any tp_size is the better word
            compare_losses(hf_config)
        raise ConfigError(f"{kind}{reason(error).rstrip('.')}. Take tp_size 1") from error
    if len(watch.random) > 1:
        raise ConfigError(
            f"{kind}it has dropout on attention heads or other activations that are divided, where each rank needs its "
            "own random numbers, and on activations that are whole, where all need the same. Set one of them to 0 in "
            "the model's config.json (attention_dropout, or resid_pdrop, residual_dropout, …), or take tp_size 1"
        )
    random = "divided" in watch.random
    return Rehearsal(own_loss, summed, watch.blocks, random, whole_logits, undecayed(model, loss))


def _pass(model: torch.nn.Module) -> tuple[torch.Tensor, bool, str]:
    """What `train_step` does: (the loss, `own_loss`, `whole_logits`)."""
    usual = model.loss_function is ForCausalLMLoss  # which the run replaces by an equal one
    asked: set[str] = set()
    why = delay_logits(model.get_output_embeddings(), asked)
    try:
        loss, counted, late = _forward(model)
    except (TypeError, AttributeError) as error:
        if not any(words in str(error) for words in ("unexpected keyword", "has no attribute 'loss'")):
            raise
        counted = False
    own_loss = not (counted and usual)
    if own_loss:
        loss_from_logits(model)
        asked.clear()
        loss, counted, late = _forward(model)
        if not counted:
            raise ValueError("its logits are not one vector per token")
    why = why or f"its class calls {', '.join(sorted(asked)) or 'no head'} on the way to its loss"
    return loss, own_loss, "" if late else why


def _forward(model: torch.nn.Module) -> tuple[torch.Tensor, bool, bool]:
    """(the loss; whether it is `loss_function`'s, of all logits, labels and the number of targets; and of `Logits`)."""
    calls, device = [], next(model.parameters()).device
    ids, count = torch.zeros(SAMPLE, dtype=torch.long, device=device), torch.ones((), device=device)

    def loss_function(
        logits: torch.Tensor, labels: Any, vocab_size: int = 0, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        """A loss that shows where it comes from."""
        late = isinstance(logits, Logits) and logits.made is None
        right = logits.shape[:2] == ids.shape and labels is ids and num_items_in_batch is count
        loss = Leave.apply(computed(logits, "loss")).sum()
        calls.append((loss, right, late))
        return loss

    model.train().loss_function = loss_function
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=count, use_cache=False).loss
    unchanged = loss._version == 0  # an auxiliary loss may be added in place
    same = [(right, late) for result, right, late in calls if result is loss]
    return loss, unchanged and any(right for right, _ in same), all(late for _, late in same)


def _check_reach(model: torch.nn.Module, loss: torch.Tensor) -> None:
    """Raises `ConfigError` if a weight has no part in the loss: weight decay alone would change it."""
    reached = regions(loss)
    left = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    if left:
        raise ConfigError(
            f"model_name: {model.config.model_type!r} has {len(left)} weights ({sum(left.values()):,} parameters) that "
            f"training on text does not reach, such as {next(iter(left))}. Take a model of text alone"
        )


def compare_losses(hf_config: transformers.PretrainedConfig) -> None:
    """Check the loss from the logits against a class's own, on random weights and 2 of the layers.

    Raises:
        ConfigError: if they differ, so that training would follow another loss than the model's.
    """
    _refuse_routers_loss(hf_config)
    with quiet():
        model = _small(hf_config).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(hf_config.get_text_config().vocab_size, SAMPLE, generator=draw)
    labels = ids.clone()
    labels[0, : SAMPLE[1] // 2] = IGNORED
    with torch.no_grad():
        own = model(input_ids=ids, labels=labels)[0].item()
        loss_from_logits(model)
        ours = model(input_ids=ids, labels=labels).loss.item()
    if not abs(own - ours) <= 1e-4 * abs(ours):  # nor if one is no number
        raise ConfigError(
            f"model_name: {hf_config.model_type!r} has a loss of its own: {own:.4f} on a "
            f"sample, where the mean cross-entropy of the next token is {ours:.4f}. Only the latter can be divided "
            "over micro-batches and ranks; if it adds an auxiliary loss, turn that off"
        )


def _refuse_routers_loss(hf_config: transformers.PretrainedConfig) -> None:
    """Of a class whose loss is not that of its logits alone."""
    if getattr(hf_config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            f"model_name: {hf_config.model_type!r} adds its routers' loss to that of the next token "
            "(output_router_logits = true in its config.json), which can't be divided over micro-batches and ranks; "
            "set it to false"
        )


def _small(hf_config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The model with storage, random weights and 2 of its layers, if its config can be cut so."""
    cut = copy.deepcopy(hf_config)
    text = cut.get_text_config()
    try:
        text.num_hidden_layers = min(2, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:2]
        size = sum(parameter.numel() for parameter in meta_model(cut).parameters())
    except Exception:
        cut, size = hf_config, sum(parameter.numel() for parameter in meta_model(hf_config).parameters())
    if size > LARGEST:
        raise ConfigError(
            f"model_name: {hf_config.model_type!r} must be tried on the CPU before it is trained, and {size:,} "
            f"parameters are too many for that (the limit is {LARGEST:,})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_model(cut, torch.float32)


@contextmanager
def quiet() -> Iterator[None]:
    """AutoTP as for training, a mask of causal attention without a look at positions, and nothing below an error."""
    logging.disable(logging.WARNING)
    try:
        with (
            mock.patch.object(autotp_layers, "DEEPSPEED_AUTOTP_MODE", AUTOTP_MODE.TRAINING),
            mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)
