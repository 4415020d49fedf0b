"""What one rank of a TP group holds of a model, in numbers: what the planner predicts memory, traffic and time from."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

from tp2d_helpers.model.norms import Norms
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.styles import COLUMN, EXPERTS, NORM, ROW


class Matmul(NamedTuple):
    """A matrix that activations are multiplied by, [inputs, outputs] or the other way round, as one rank has it."""

    name: str  # of the weight
    inputs: int
    outputs: int
    style: str = ""  # of its module in the plan
    linear: bool = True  # a layer of that kind, which LoRA can hang an adapter beside
    experts: int = 1  # of a mixture, how many such matrices there are
    per_token: int = 1  # and how many of them a token meets

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied by."""
        return self.per_token * self.inputs * self.outputs

    @property
    def weights(self) -> int:
        """Parameters, all experts' included."""
        return self.experts * self.inputs * self.outputs


class AllReduces(NamedTuple):
    """How many of a micro-batch's tensors are summed over the TP group, in all decoder layers.

    Attributes:
        forward: hidden states, [tokens, hidden]: after each row-wise layer, and each layer's experts.
        blocks, columns: gradients of hidden states: one per block, or per column-wise layer; one for a layer's experts.
        numbers: further numbers per token, forward and backward: the gradients of the router's weights, and the squares
            of norms over all heads with their gradients.
    """

    forward: int = 0
    blocks: int = 0
    columns: int = 0
    numbers: int = 0

    @classmethod
    def of(cls, plan: Plan, per_token: int) -> AllReduces:
        """Of a plan, and the experts that a token meets. What gathers (a linear attention) is left out."""
        styles = [*plan.styles.values()]
        rows, columns, experts, norms = map(styles.count, (ROW, COLUMN, EXPERTS, NORM))
        blocks = {name.rpartition(".")[0] for name, style in plan.styles.items() if style == COLUMN}
        return cls(rows + experts, len(blocks) + experts, columns + experts, 2 * norms + per_token * experts)


@dataclass(frozen=True)
class Shard:
    """What one rank of a TP group holds of a model: counts, and widths in elements per token.

    Ranks that share a key-value head have one each. Where layers differ, `mlp_in`, `mlp_out` and `gathered` are means.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    heads: int
    vocabulary: int
    parameters: int
    tied: bool
    normed_heads: bool  # queries and keys pass norms
    layer_matmuls: tuple[Matmul, ...]  # of all decoder layers
    all_reduces: AllReduces
    norms: Norms = field(default_factory=Norms)
    joined: bool = False  # queries, keys and values are one tensor before the first two are rotated
    masked: float = 0  # the share of layers whose attention sees a window of the sequence, by a mask
    window: int = 0  # tokens that those see

    @functools.cached_property
    def _mlp(self) -> tuple[float, float]:
        """(mlp_in, mlp_out): of a layer's matrices besides attention's, the sides other than `hidden`, added up."""
        found = [matmul for matmul in self.layer_matmuls if "att" not in matmul.name]
        total = sum(matmul.active for matmul in found) / self.hidden / self.layers
        inner = total / (3 if any("gate_" in matmul.name for matmul in found) else 2)
        return total - inner, inner

    @property
    def mlp_in(self) -> float:
        """What an MLP's first matrices make: gate and up, or up alone; of a mixture, those of a token's experts."""
        return self._mlp[0]

    @property
    def mlp_out(self) -> float:
        """What an MLP's last matrix takes."""
        return self._mlp[1]

    @property
    def gathered(self) -> float:
        """Copies of hidden states that experts take, and what they make of them, before it is combined."""
        return sum(m.per_token * self.hidden for m in self.layer_matmuls if m.experts > 1) / self.layers

    @property
    def layer_weights(self) -> float:
        """Elements of a layer's matrices."""
        return sum(matmul.weights for matmul in self.layer_matmuls) / self.layers

    @property
    def adapted(self) -> list[Matmul]:
        """Where LoRA hangs an adapter: all linear layers; experts and routers have none."""
        return [matmul for matmul in self.layer_matmuls if matmul.linear]

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA's adapters on this rank: r · (in + out) each."""
        return rank * sum(matmul.inputs + matmul.outputs for matmul in self.adapted)
