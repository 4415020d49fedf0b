"""AutoTP's own steps on a model without storage, and what they mean for the gradients.

Between a block's column-wise layers (Megatron's f) and its row-wise one (g) each rank has its own part of the
activations. The gradient of a whole weight that is used there is a part, too, and must be summed over the TP group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelEmbedding
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
from deepspeed.sequence.cross_entropy import validate_vocab_parallel_loss
from torch.utils._python_dispatch import TorchDispatchMode

from tp2d_helpers.model.sharding import divided_dimension, planned_shapes
from tp2d_helpers.speed.layers import block_input, column_layers


def convert(model: torch.nn.Module, tp_size: int) -> set[str]:
    """Let AutoTP replace the layers of a meta model, and give each weight the shape of a shard.

    Returns:
        Names of the whole weights whose gradients AutoTP sums over the TP group.

    Raises:
        ConfigError: if the model has no plan that can be followed, or tp_size doesn't fit it.
        ValueError, NotImplementedError: if AutoTP refuses the model, or divides it otherwise than planned.
    """
    planned = planned_shapes(model, tp_size)
    wanted = {name: divided_dimension(parameter.shape, planned[name]) for name, parameter in model.named_parameters()}
    specs = TPPlanConverter.convert(_get_hf_tp_plan(model))
    plan = AutoTPConfig(tp_size=tp_size, layer_specs=specs)
    autotp = AutoTP(
        module=model, all_reduce_linears=(), prefix="", state_dict=None, orig_layer_impl=None,
        linear_layer_setting=(torch.nn.Linear, torch.nn.Embedding), partition_config=plan,
        vocab_parallel_lm_head=True, model_config=model.config, training_mode=True,
    )  # fmt: skip
    autotp.mp_size = tp_size  # without a group: it replaces the layers and leaves the weights whole
    autotp._resolve_vocab_parallel_lm_head()
    validate_vocab_parallel_loss(model)
    autotp.update_linear_policies()
    autotp._replace_module(model)
    found = dict(_cuts(model))
    if unlike := [name for name in wanted if found[name] != wanted[name]]:
        raise ValueError(f"{unlike[0]} would be cut in dimension {found[unlike[0]]}, planned is {wanted[unlike[0]]}")
    for name, parameter in model.named_parameters():
        parameter.data = parameter.new_empty(planned[name])
    for embedding in filter(lambda module: isinstance(module, VocabParallelEmbedding), model.modules()):
        embedding.padding_idx = None  # an index of the whole vocabulary, as long as there is no group
    matching = {name: plan.find_matching_spec(name, autotp._get_model_type()) for name in planned}
    return {name for name, spec in matching.items() if spec and spec.grad_allreduce}


def _cuts(model: torch.nn.Module) -> Iterator[tuple[str, int | None]]:
    """(name, dimension that AutoTP's layer divides) of each weight."""
    for prefix, module in model.named_modules():
        rows, columns = isinstance(module, LinearAllreduce), isinstance(module, LinearLayer | VocabParallelEmbedding)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, 0 if columns else 1 if rows and parameter is module.weight else None


class Enter(torch.autograd.Function):
    """Marks in the graph where activations become divided; computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Never called: only the graph counts."""
        return gradient


class Leave(Enter):
    """Marks where they are whole again."""


class Watch(TorchDispatchMode):
    """During a pass of a model: the marks, the blocks' inputs and the places of random numbers.

    Attributes:
        blocks: names of the modules whose column-wise layers all take the module's own input.
        random: of "divided" and "whole", what random numbers were drawn for.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inside, self.random = False, set()
        self.blocks = {name for name, module in model.named_modules() if column_layers(module)}
        for name, module in model.named_modules():
            if isinstance(module, LinearLayer):
                module.register_forward_pre_hook(self._enter)
            elif isinstance(module, LinearAllreduce | VocabParallelEmbedding):
                module.register_forward_hook(self._leave)
            if name in self.blocks:
                self._watch_block(name, module)

    def _watch_block(self, name: str, block: torch.nn.Module) -> None:
        given: list[Any] = []

        def begin(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            """Note what the block is called with."""
            given[:] = [block_input(args, kwargs)]

        def compare(_: Any, args: tuple) -> None:
            """A layer of the block is called with something else."""
            if not given or args[0] is not given[0]:
                self.blocks.discard(name)

        block.register_forward_pre_hook(begin, with_kwargs=True)
        for column in column_layers(block):
            column.register_forward_pre_hook(compare, prepend=True)

    def _enter(self, _: torch.nn.Module, args: tuple) -> tuple:
        self.inside = True
        return (Enter.apply(args[0]), *args[1:])

    def _leave(self, _: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        self.inside = False
        return Leave.apply(output)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The operation itself."""
        if torch.Tag.nondeterministic_seeded in operation.tags:
            self.random.add("divided" if self.inside else "whole")
        return operation(*args, **(kwargs or {}))


def regions(loss: torch.Tensor) -> dict[int, set[str]]:
    """Where in the graph of a loss the weights are used: id of a weight → some of "divided", "whole", "wrong".

    "wrong" is what a gradient passes that meets a mark from the wrong side: whole activations mixed with divided ones
    come without the sum that the mark stands for.
    """
    found: dict[int, set[str]] = {}
    queue, seen = [(loss.grad_fn, "whole")], set()
    while queue:
        node, region = queue.pop()
        if node is None or (node, region) in seen:
            continue
        seen.add((node, region))
        if hasattr(node, "variable"):
            found.setdefault(id(node.variable), set()).add(region)
        kind = type(node).__name__
        if kind in ("EnterBackward", "LeaveBackward") and region != "wrong":
            before, after = ("divided", "whole") if kind == "EnterBackward" else ("whole", "divided")
            region = after if region == before else "wrong"
        queue += [(node, region) for node, _ in node.next_functions]
    return found


def unsummed(model: torch.nn.Module, loss: torch.Tensor, summed: set[str]) -> list[str]:
    """Names of the whole weights of a converted model whose gradients must be summed, and AutoTP doesn't.

    Raises:
        ValueError: if the gradients of two ranks can't be made one process's.
    """
    used, result = regions(loss), []
    cuts = dict(_cuts(model))
    biases = {id(module.bias) for module in model.modules() if isinstance(module, LinearAllreduce)}  # added after g
    for name, parameter in model.named_parameters():
        where = used.get(id(parameter), set()) if id(parameter) not in biases else {"whole"}
        if len(where) > 1 or "wrong" in where:
            raise ValueError(f"{name} is used on activations that are divided and on some that are whole")
        if cuts[name] is not None and where != {"divided"}:
            raise ValueError(f"{name} is divided, and used on activations that are whole")
        if name in summed and where != {"divided"}:
            raise ValueError(f"the gradient of {name} is whole on each rank, and its plan sums it over the ranks")
        if cuts[name] is None and where == {"divided"} and name not in summed:
            result.append(name)
    return result
