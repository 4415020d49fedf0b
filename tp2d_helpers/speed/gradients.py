"""Gradients of ZeRO 1 and 2: summed over a step's micro-batches and over the replicas, in fp32 by default.

A bf16 sum loses what is 256 times smaller than itself: of 64 micro-batches, the last ones count for little. DeepSpeed
sums in fp32 by another optimizer class at stage 1, with checkpoints of its own, and waits on the host for each
backward pass whose reduction it overlaps. Here each gradient is added to a flat sum as autograd hands it out,
and the sums of a bucket travel to the replica that steps these weights as soon as they are complete.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

try:
    from tp2d_helpers.speed.kernels import add_to
except ImportError:  # Triton comes with PyTorch for GPUs only
    add_to = None

BUCKET = 100_000_000  # elements that travel at once: 0.4 GB in fp32, beyond which links get no faster


def in_fp32(wanted: str, master_weights: str) -> bool:
    """Whether a run's gradients are summed in fp32, by the settings `gradient_dtype` and `master_weights`.

    "auto" is fp32, except where the sum ends in bf16 weights.
    """
    return wanted == "fp32" or (wanted == "auto" and master_weights == "fp32")


@dataclass
class Bucket:
    """A range of a group's flat weights, that of one replica's step.

    Attributes:
        parts: how many parameters have a part of it; `waits`: those whose gradients this backward pass still lacks.
        sums: at ZeRO 2, one backward pass's gradients, as long as they travel.
    """

    begin: int
    end: int
    owner: int
    parts: int = 0
    waits: int = 0
    sums: torch.Tensor | None = None


class Sums:
    """The sums of one parameter group's gradients, in the layout of its flat weights [dp · partition].

    At ZeRO 1 all of them, and they travel once per step; at ZeRO 2 this replica's partition, and a bucket's gradients
    travel with each micro-batch.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, i: int, dtype: torch.dtype, in_order: bool) -> None:
        self.in_order = in_order
        flat, self.group = optimizer.bit16_groups_flat[i], optimizer.real_dp_process_group[i]
        self.rank, self.replicas = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.partition = len(flat) // self.replicas
        self.keeps_all = not optimizer.partition_gradients or self.replicas == 1
        self.parameters, self.places = optimizer.bit16_groups[i], places(optimizer, i)
        self.first = 0 if self.keeps_all else self.rank * self.partition  # flat weight of the first sum
        self.sums = flat.new_zeros(len(flat) if self.keeps_all else self.partition, dtype=dtype)
        self.buckets, self.parts = self._cut()
        self.written: set[int] = set()  # by where they begin: parameters (ZeRO 1) or buckets (ZeRO 2) summed before
        self._begin_pass()

    def _cut(self) -> tuple[list[Bucket], dict[int, list[tuple[Bucket, range]]]]:
        """The buckets, in the order in which a backward pass completes them, and the parts of each parameter."""
        buckets, size = [], BUCKET // self.replicas if self.in_order else BUCKET  # of which the owner has all at once
        for owner in reversed(range(self.replicas)):
            last = (owner + 1) * self.partition
            for begin in reversed(range(owner * self.partition, last, size)):
                buckets.append(Bucket(begin, min(begin + size, last), owner))
        parts = {}
        for parameter in self.parameters:
            place = self.places[id(parameter)]
            cut = [(bucket, _common(place, range(bucket.begin, bucket.end))) for bucket in buckets]
            parts[id(parameter)] = [(bucket, part) for bucket, part in cut if part]
            for bucket, _ in parts[id(parameter)]:
                bucket.parts += 1
        return buckets, parts

    def _begin_pass(self) -> None:
        self.sent, self.works = 0, []
        for bucket in self.buckets:
            bucket.waits = bucket.parts

    def of(self, place: range) -> torch.Tensor:
        """The sums of a range of flat weights."""
        return self.sums[place.start - self.first : place.stop - self.first]

    def add(self, parameter: torch.nn.Parameter, travels: bool) -> None:
        """Add a parameter's gradient, and free it.

        Args:
            travels: whether the replicas' sums are reduced in this backward pass.
        """
        place, gradient = self.places[id(parameter)], parameter.grad.reshape(-1)
        if self.keeps_all:
            _add(self.of(place), gradient, place.start not in self.written)
            self.written.add(place.start)
        parameter.grad = None
        if not travels:
            return
        for bucket, part in self.parts[id(parameter)]:
            if not self.keeps_all:
                sums = self._sums(bucket)[part.start - bucket.begin : part.stop - bucket.begin]
                _add(sums, gradient[part.start - place.start : part.stop - place.start], first=True)
            bucket.waits -= 1
        # In one order on all replicas, whatever order their gradients come in.
        while self.sent < len(self.buckets) and not self.buckets[self.sent].waits:
            self._send()

    def _sums(self, bucket: Bucket) -> torch.Tensor:
        if self.keeps_all:
            return self.of(range(bucket.begin, bucket.end))
        if bucket.sums is None:
            bucket.sums = self.sums.new_zeros(bucket.end - bucket.begin)
        return bucket.sums

    def _send(self) -> None:
        """Begin to reduce the next bucket."""
        bucket = self.buckets[self.sent]
        owner = dist.get_global_rank(self.group, bucket.owner)
        sums, parts = self._sums(bucket), None
        if self.in_order:
            parts = [torch.empty_like(sums) for _ in range(self.replicas)] if bucket.owner == self.rank else []
            work = dist.gather(sums, parts or None, owner, group=self.group, async_op=True)
        else:
            work = dist.reduce(sums, owner, group=self.group, async_op=True)
        self.works.append((bucket, parts, work))
        self.sent += 1
        if len(self.works) > 2 and (self.in_order or not self.keeps_all):
            self._receive(*self.works.pop(0))

    def _receive(self, bucket: Bucket, parts: list[torch.Tensor] | None, work: dist.Work) -> None:
        """Let the device wait for a bucket's sums, and its owner have their mean.

        Args:
            parts: of all replicas, where they are added up here, in the order of their ranks.
        """
        work.wait()
        sums, bucket.sums = self._sums(bucket), None
        if bucket.owner != self.rank:
            return
        if parts:
            sums.copy_(functools.reduce(torch.Tensor.add_, parts))
        if self.keeps_all:
            sums.div_(self.replicas)
            return
        mine = self.of(range(bucket.begin, bucket.end))
        _add(mine, sums.div_(self.replicas), bucket.begin not in self.written)
        self.written.add(bucket.begin)

    def end_pass(self, travels: bool, last: bool) -> None:
        """After a backward pass: let the rest travel. After the `last` of a step, what had no gradient counts as 0."""
        if self.keeps_all and last:
            for place in self.places.values():
                if place.start not in self.written:
                    self.of(place).zero_()
        if travels:
            while self.sent < len(self.buckets):
                self._send()
            while self.works:
                self._receive(*self.works.pop(0))
        if last:
            self.written.clear()
        self._begin_pass()


def places(optimizer: DeepSpeedZeroOptimizer, i: int) -> dict[int, range]:
    """Where each parameter of a group lies among its flat weights, by the parameter's id."""
    flat = optimizer.bit16_groups_flat[i]
    begins = {id(p): (p.data_ptr() - flat.data_ptr()) // flat.element_size() for p in optimizer.bit16_groups[i]}
    return {id(p): range(begins[id(p)], begins[id(p)] + p.numel()) for p in optimizer.bit16_groups[i]}


def _add(sums: torch.Tensor, gradient: torch.Tensor, first: bool) -> None:
    """Add, or put there what is `first`."""
    if add_to is not None and sums.is_cuda and sums.dtype == torch.float32:
        add_to(sums, gradient, first)
    else:
        (sums.copy_ if first else sums.add_)(gradient)


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


class SummingZeroOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO 1 or 2 whose gradients are summed by `Sums`. See `sum_gradients`."""

    def begin_sums(self, dtype: torch.dtype, passes: int, in_order: bool) -> None:
        """Sum in this dtype from now on; `passes` is how many micro-batches a step has."""
        self.sum_dtype, self.in_order, self.summed = dtype, in_order, None
        # One gradient of one replica is its own sum, and stays where it is.
        self.sums_nothing = passes == 1 and dist.get_world_size(self.dp_process_group) == 1

    def _sums(self) -> list[Sums]:
        if self.summed is None:  # allocated with the first gradient, when loading is over
            self.summed = [Sums(self, i, self.sum_dtype, self.in_order) for i in range(len(self.bit16_groups))]
        return self.summed

    def _travel(self) -> bool:
        every = self.partition_gradients or self.is_gradient_accumulation_boundary()
        return every and dist.get_world_size(self.dp_process_group) > 1

    def process_gradients(self, param: torch.nn.Parameter, i: int) -> None:
        """Called as soon as autograd has the gradient of a parameter of group i."""
        if not self.sums_nothing:
            self._sums()[i].add(param, self._travel())

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Called after the last backward pass of a step at ZeRO 1."""
        self.overlapping_partition_gradients_reduce_epilogue()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Called after a backward pass. After the last one of a step, its gradients are there for `step`."""
        last = self.is_gradient_accumulation_boundary()
        for i in range(len(self.bit16_groups)):
            if not self.sums_nothing:
                self._sums()[i].end_pass(self._travel(), last)
            if last:
                self.averaged_gradients[i] = self._partition(i)
        self._epilogue_ran_this_backward = True

    def _partition(self, i: int) -> list[torch.Tensor]:
        """This replica's sums: a tensor for each parameter of its partition, and paddings, marked as DeepSpeed does."""
        size = len(self.bit16_groups_flat[i]) // dist.get_world_size(self.real_dp_process_group[i])
        begin = dist.get_rank(self.real_dp_process_group[i]) * size
        sums = None if self.sums_nothing else self._sums()[i]
        where, result, at = sums.places if sums else places(self, i), [], begin

        def piece(part: range, parameter: torch.nn.Parameter | None = None) -> torch.Tensor:
            """The gradients of a range of flat weights."""
            if sums:
                return sums.of(part)
            if parameter is None or parameter.grad is None:
                return torch.zeros(len(part), dtype=self.dtype, device=self.device)
            return parameter.grad

        for parameter in [*self.params_in_partition[i], None]:
            end = begin + size
            part = _common(where[id(parameter)], range(begin, end)) if parameter is not None else range(end, end)
            if part.start > at:
                result.append(piece(range(at, part.start)))
                result[-1]._zero_padding = True
            if part:
                result.append(piece(part, parameter))
            at = part.stop
        return result


def sum_gradients(engine: deepspeed.DeepSpeedEngine, dtype: torch.dtype, uneven: bool) -> None:
    """Let the gradients of ZeRO 1 or 2 be summed, and travel, in `dtype`.

    Args:
        uneven: whether the ranks of a TP group have shards of different sizes. A weight that all of them hold lies at
            another place among the flat weights of each then, and a reduction adds up more than two numbers in an
            order that depends on the place: the ranks' copies would drift apart. So they are added by their ranks.
    """
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.__class__ = SummingZeroOptimizer
        in_order = uneven and dist.get_world_size(optimizer.dp_process_group) > 2
        optimizer.begin_sums(dtype, engine.gradient_accumulation_steps(), in_order)
