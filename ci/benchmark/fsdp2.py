"""The strongest peer in PyTorch itself: FSDP2 over DTensor tensor parallelism, put together as torchtitan does.

- Each block gathers its input once (sequence parallel), or reduces the gradient of its input once (without).
- The head's output stays divided by vocabulary, and the loss is computed on the parts (`loss_parallel`).
- Decoder layers are compiled; AdamW is fused; masters are fp32, the computation is bf16.
- Gradients are reduced, and weights resharded, at the last micro-batch only. They are accumulated and reduced in fp32,
  or in bf16 as this package's engine does.
- In fp8, the decoder's matmuls are torchao's, with a scale per tensor, as torchtitan's recipe "tensorwise".
- The model is built on the meta device, and each rank allocates its own shards only.
- Without TP it takes any decoder of `transformers`, mixtures of experts included; with TP those of `LLAMA_LIKE`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_parameter_registration_hook
from trainer import Batch, Trainer

from tp2d_helpers.model.facts import load_config
from tp2d_helpers.model.sharding import random_model

MAX_GRAD_NORM = 1.0
LLAMA_LIKE = ("llama", "qwen2", "mistral")  # types whose blocks are as `apply_tp` takes them
# cuDNN's attention first, as this package's engine takes it on GPUs where it is the fastest.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def apply_tp(model: torch.nn.Module, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Shard a Llama-like model. Between blocks, activations are divided by position (sequence parallel) or whole."""
    if model.config.model_type not in LLAMA_LIKE:
        raise ValueError(f"{model.config.model_type}: the peer has TP for {', '.join(LLAMA_LIKE)} only")
    between, whole = Shard(1) if sequence_parallel else Replicate(), Replicate()
    layer_plan: dict[str, Any] = {
        # Called as self_attn(hidden_states=...) and mlp(x).
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": between}, desired_input_kwarg_layouts={"hidden_states": whole}
        ),
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    model_plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence_parallel:
        norm = SequenceParallel(use_local_output=True)
        layer_plan |= {f"{name}_layernorm": norm for name in ("input", "post_attention")}
        model_plan["model.norm"] = norm
    parallelize_module(model, mesh, model_plan)
    for layer in model.model.layers:
        parallelize_module(layer, mesh, layer_plan)


def apply_fsdp(
    model: torch.nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None, gradients: torch.dtype | None
) -> None:
    """Divide fp32 masters over the DP mesh, a group per layer.

    Args:
        dtype: of the computation, None for fp32.
        gradients: in which they are accumulated and reduced, None for `dtype`.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=gradients)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def build(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The model with parameters on the meta device, and buffers, which are computed and never loaded, on the CPU."""
    to_meta = lambda _, name, p: p if p.is_meta else torch.nn.Parameter(p.to("meta"))  # noqa: E731
    hook = register_module_parameter_registration_hook(to_meta)
    try:
        return random_model(config, torch.float32)
    finally:
        hook.remove()


@torch.no_grad()
def initialise(model: torch.nn.Module, device: torch.device, rank: int) -> None:
    """Allocate this rank's shards, and draw them at random: matrices normal, biases zero, norms one."""
    config, buffers = model.config, dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if config.tie_word_embeddings:  # `to_empty` allocates the two by themselves
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(rank)
    scale = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma's norms add one to their weights
    for name, parameter in model.named_parameters():
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim > 1:
            shard.normal_(std=config.initializer_range, generator=generator)
            shard.mul_("lora_B" not in name)  # zero at the start
        else:
            shard.fill_(0.0 if name.endswith("bias") else scale)


def add_peft_adapters(model: torch.nn.Module, rank: int) -> None:
    """peft's LoRA on all linear layers but the head; nothing else is trained."""
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=32, target_modules=names), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def to_float8(model: torch.nn.Module) -> None:
    """torchao's matmuls in fp8 for the decoder's layers; masters stay fp32."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model.model, config=config)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the targets, computed in fp32."""
    return F.cross_entropy(logits.float(), targets)


class Peer:
    """The model, its optimizer and one optimizer step."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.mesh = init_device_mesh(self.device.type, (job["dp"], job["tp"]), mesh_dim_names=("dp", "tp"))
        self.config = load_config(job["model"])
        self.config.use_cache = False
        self.lora = bool(job["lora_rank"])
        self.model = build(self.config)
        if self.lora:
            add_peft_adapters(self.model, job["lora_rank"])
            if cuda:  # all weights in bf16, also AdamW's moments: FSDP2 takes one dtype per group
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.to(torch.bfloat16)
        if job["precision"] == "fp8":
            to_float8(self.model)
        self.sync_last = job["sync"] == "last"
        # Not compiled where the vocabulary is divided: with PyTorch 2.13 (on CPU) that yields another value.
        alone = cuda and job["tp"] == 1
        self.cross_entropy = torch.compile(cross_entropy, dynamic=False) if alone else F.cross_entropy
        if job["async_tp"]:
            micro_pipeline_tp(self.mesh["tp"])
        if job["tp"] > 1:
            apply_tp(self.model, self.mesh["tp"], job["sequence_parallel"])
        if cuda:
            self.attention = sdpa_kernel(ATTENTION, set_priority=True)  # kept: it ends when it is collected
            self.attention.__enter__()
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        wide = torch.float32 if cuda and job["gradients"] == "fp32" else None
        apply_fsdp(self.model, self.mesh["dp"], torch.bfloat16 if cuda else None, wide)
        initialise(self.model, self.device, rank)
        self.model.train()
        self.positions = torch.arange(job["seq"], device=self.device)[None]
        # A group per mesh, as a fused kernel can't take both: without sequence parallel, norms are not on TP's.
        groups: dict[int, list[torch.nn.Parameter]] = {}
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            groups.setdefault(parameter.device_mesh.ndim, []).append(parameter)
        # What TP ranks hold copies of; a tensor, for the norm of the gradients without a wait for the GPU.
        copies = [p.device_mesh.ndim == 1 or p.placements[-1].is_replicate() for p in self.trained]
        self.copied = torch.tensor(copies, device=self.device)
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups.values()], lr=1e-5, weight_decay=0.01, fused=True
        )

    def step(self, micro_batches: list[Batch]) -> torch.Tensor:
        """One optimizer step; this rank's mean loss."""
        losses = []
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            if self.sync_last:
                self.model.set_requires_gradient_sync(last)
                self.model.set_reshard_after_backward(last)
                self.model.set_is_last_backward(last)
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            with loss_parallel():
                loss = self.loss(batch["input_ids"], batch["labels"])
                (loss / len(micro_batches)).backward()
            loss = loss.detach()
            losses.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
        self.update()
        return torch.stack(losses).mean()

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token. The positions are given: the embedding's output may be divided."""
        logits = self.model(input_ids=ids, position_ids=self.positions, use_cache=False).logits
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        return self.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def update(self) -> None:
        """Clip by the global norm, step, forget the gradients."""
        self.norm = clip_gradients(self.trained, self.copied, self.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def clip_gradients(parameters: list[torch.nn.Parameter], copied: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Scale gradients to a global norm of at most `MAX_GRAD_NORM`; return the norm before, a 0-dim tensor.

    On the local shards: `clip_grad_norm_` takes no gradients of two meshes. DP ranks hold disjoint parts of everything,
    TP ranks disjoint parts of what TP divides, and copies of the rest (where `copied` is true), which count once.
    """
    shards = [parameter.grad.to_local() for parameter in parameters]
    squares = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32)).square()
    total = torch.where(copied, 0.0, squares).sum()
    dist.all_reduce(total, group=mesh["tp"].get_group())
    total += torch.where(copied, squares, 0.0).sum()
    dist.all_reduce(total, group=mesh["dp"].get_group())
    norm = total.sqrt()
    torch._foreach_mul_(shards, (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def micro_pipeline_tp(mesh: DeviceMesh) -> None:
    """Let the compiler split gathers and scatters of the sequence so that they overlap with matmuls."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def fsdp2_trainer(job: dict[str, Any], rank: int) -> Trainer:
    """The peer, ready to be measured."""
    peer = Peer(job, rank)
    local, trained = (sum(p.to_local().numel() for p in part) for part in (peer.model.parameters(), peer.trained))
    return Trainer(
        config=peer.config,
        dp_rank=rank // job["tp"],
        step=peer.step,
        update=(peer, "update"),
        norm=lambda: peer.norm,
        # Masters and moments are divided over DP; the bf16 weights are whole while a step runs.
        state_bytes=(4 if peer.lora else 12) * trained + 2 * local * job["dp"],
        adapters=trained * job["dp"] if peer.lora else 0,
    )
