"""AutoTP's own steps on a model without storage, and what they mean for the gradients.

Between a block's column-wise layers (Megatron's f) and its row-wise one (g) each rank has its own part of the
activations. The gradient of a whole weight that is used there is a part, too, and must be summed over the TP group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelEmbedding
from deepspeed.sequence.cross_entropy import validate_vocab_parallel_loss
from torch.utils._python_dispatch import TorchDispatchMode

from tp2d_helpers.model.divide import divide
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.speed.layers import block_input, column_layers


def convert(model: torch.nn.Module, plan: Plan) -> None:
    """Divide a meta model as a run will: what this package divides, then what AutoTP does. Each weight becomes a shard.

    Raises:
        ValueError, NotImplementedError: if AutoTP refuses the model, or divides it otherwise than planned.
    """
    planned = plan.shapes(model)
    divide(model, plan, None, 0)
    replace_layers(model, plan)
    validate_vocab_parallel_loss(model)
    found = dict(_cuts(model))
    for name, cut in plan.cuts.items():
        if name in found and found[name] != cut.dim and name.rpartition(".")[0] not in plan.own:
            raise ValueError(f"{name} would be cut in dimension {found[name]}, planned is {cut.dim}")
    for name, parameter in model.named_parameters():
        parameter.data = parameter.new_empty(planned[name])
    for embedding in filter(lambda module: isinstance(module, VocabParallelEmbedding), model.modules()):
        embedding.padding_idx = None  # an index of the whole vocabulary, as long as there is no group


def replace_layers(
    model: torch.nn.Module, plan: Plan, group: Any = None, head: bool = True, summed: Iterable[str] = ()
) -> AutoTP:
    """Let AutoTP replace the layers, by the steps of `deepspeed.initialize`. Without a group, weights stay whole.

    Args:
        head: whether the head is cut by vocabulary, too.
        summed: names of whole weights whose gradients are to be summed.
    """
    autotp = AutoTP(
        module=model, all_reduce_linears=(), prefix="", state_dict=None, orig_layer_impl=None,
        linear_layer_setting=(torch.nn.Linear, torch.nn.Embedding), keep_module_on_host=group is not None,
        partition_config=AutoTPConfig.from_dict(plan.partition_config(summed)),
        vocab_parallel_lm_head=head, model_config=model.config, training_mode=True,
    )  # fmt: skip
    autotp.mp_size, autotp.mp_group = plan.tp_size, group
    if head:
        autotp._resolve_vocab_parallel_lm_head()
    autotp.update_linear_policies()
    autotp._replace_module(model)
    return autotp


def _cuts(model: torch.nn.Module) -> Iterator[tuple[str, int | None]]:
    """(name, dimension that AutoTP's layer divides) of each weight of its layers."""
    for prefix, module in model.named_modules():
        rows, columns = isinstance(module, LinearAllreduce), isinstance(module, LinearLayer | VocabParallelEmbedding)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if rows or columns:
                yield name, 0 if columns else 1 if parameter is module.weight else None


class Enter(torch.autograd.Function):
    """Marks in the graph where activations become divided; computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """A copy, as some classes add to it in place."""
        return x.clone()

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

    def __init__(self, model: torch.nn.Module, tp_size: int) -> None:
        super().__init__()
        self.inside, self.random = False, set()
        self.blocks = {name for name, module in model.named_modules() if column_layers(module)}
        for name, module in model.named_modules():
            if isinstance(module, LinearLayer):
                module.register_forward_pre_hook(self._enter)
                if module.gather_output:
                    module.register_forward_hook(partial(self._gather, tp_size))
            elif isinstance(module, LinearAllreduce | VocabParallelEmbedding):
                module.register_forward_hook(self._leave)
            elif getattr(module, "tp_region", False):
                module.register_forward_pre_hook(self._enter)
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
        return tuple(Enter.apply(value) if value.is_floating_point() else value for value in args)

    def _gather(self, tp_size: int, _: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        self.inside = False
        return torch.cat([Leave.apply(output)] * tp_size, -1)

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


def unsummed(model: torch.nn.Module, loss: torch.Tensor, plan: Plan) -> list[str]:
    """Names of the whole weights of a converted model whose gradients must be summed.

    Raises:
        ValueError: if the gradients of two ranks can't be made one process's.
    """
    used, result = regions(loss), []
    biases = {id(module.bias) for module in model.modules() if isinstance(module, LinearAllreduce)}  # added after g
    for name, parameter in model.named_parameters():
        where = used.get(id(parameter), set()) if id(parameter) not in biases else {"whole"}
        if len(where) > 1 or "wrong" in where:
            raise ValueError(f"{name} is used on activations that are divided and on some that are whole")
        if name in plan.cuts and where != {"divided"}:
            raise ValueError(f"{name} is divided, and used on activations that are whole")
        if name not in plan.cuts and where == {"divided"}:
            result.append(name)
    return result
