"""Training in PyTorch and transformers, and for LoRA peft, alone: what every run of the package is to equal."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import peft
import torch
import transformers
from grid import Run
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tp2d_helpers.data.dataloader import create_dataloader, data_settings, global_batches
from tp2d_helpers.model.lora import add_adapters, kinds
from tp2d_helpers.model.plan import Plan

PRODUCTS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, Conv1D)
# What classes of transformers multiply by themselves, by the ends of their names; what else they hold is a bias.
OWN_PRODUCTS = {
    "Router": r"weight",
    "Experts": r"(gate_up|gate|up|down)_proj|weight",
    "Rglru": r"(input|recurrent)_gate_weight",  # RecurrentGemma's
}


def decaying(model: torch.nn.Module) -> set[str]:
    """The weights that are to decay, by the classes of the modules that hold them; another rule than the package's."""
    found = set()
    for module in model.modules():
        own = next((names for end, names in OWN_PRODUCTS.items() if type(module).__name__.endswith(end)), "")
        own = "weight" if isinstance(module, PRODUCTS) else own
        found |= {id(p) for name, p in module.named_parameters(recurse=False) if re.fullmatch(own, name)}
    return {name for name, p in model.named_parameters() if id(p) in found and p.requires_grad}


def rate_of(settings: dict[str, Any], done: int, total: int) -> float:
    """The learning rate after `done` steps of `total`, written out; another form than that of `transformers`."""
    peak, low, warm = settings["learning_rate"], settings["min_learning_rate"], settings["warmup_steps"]
    kind, warm = settings["learning_rate_schedule"], warm if warm >= 1 else math.ceil(warm * total)
    if done < warm:  # from 0; that of warmup-stable-decay from the lowest
        start = low if kind == "warmup-stable-decay" else 0.0
        return start + (peak - start) * done / warm
    left = (total - done) / (total - warm)  # of what is not warm-up: from 1 to 0
    tail = math.ceil(total / 5)
    falls = {
        "constant": 1.0,
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "warmup-stable-decay": 1 - math.sqrt(max(0.0, 1 - (total - done) / tail)),
    }
    return low + (peak - low) * falls[kind]


def plain_run(config: dict[str, Any], later: dict[str, Any] | None = None, after: int = 0) -> Run:
    """Train as `config` says, in fp32, in this process, on the whole global batch at once.

    Args:
        later: settings of the optimizer that count from step `after` + 1 on, as if the run had been resumed with them.
    """
    torch.manual_seed(config["seed"])
    model = AutoModelForCausalLM.from_pretrained(config["model_name"], dtype=torch.float32).train()
    for name, made in AutoModelForCausalLM.from_config(model.config).named_parameters():
        model.get_parameter(name).requires_grad_(made.requires_grad)  # a class may freeze some
    if config["lora_rank"]:
        model = with_peft(model, config)
    share = config["dp_size"] * config["gradient_accumulation_steps"]
    whole = {**config, "batch_size_per_gpu": config["batch_size_per_gpu"] * share, "dp_size": 1,
             "gradient_accumulation_steps": 1}  # fmt: skip
    loader = create_dataloader(dp_rank=0, **data_settings(whole))
    decays = decaying(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [[p for name, p in trained.items() if (name in decays) == decay] for decay in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups if group])
    records = []
    for epoch in range(config["num_epochs"]):
        loader.batch_sampler.set_epoch(epoch)
        for (batch,), tokens in global_batches(loader):
            now = config if len(records) < after or not later else {**config, **later}
            rate = rate_of(now, len(records), now["num_epochs"] * loader.batch_sampler.steps_per_epoch)
            adam = dict(betas=(now["adam_beta1"], now["adam_beta2"]), eps=now["adam_epsilon"])
            for group, decay in zip(optimizer.param_groups, (now["weight_decay"], 0.0), strict=False):
                group.update(lr=rate, weight_decay=decay, **adam)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), now["max_grad_norm"] or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            records.append(dict(step=len(records) + 1, epoch=epoch, loss=loss.item(), grad_norm=norm.item(),
                                learning_rate=rate, tokens=tokens))  # fmt: skip
    weights = {_ours(name): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return Run(config, records, weights, replicated={}, sharded={}, copies={})


def with_peft(model: transformers.PreTrainedModel, config: dict[str, Any]) -> peft.PeftModel:
    """The model with peft's adapters, which begin with the numbers that the package draws."""
    other = copy.deepcopy(model)
    ours = add_adapters(other, config, Plan(1), None)
    # Of a mixture, peft takes names of an MLP's layers for the experts'.
    mlps = [name for name in ours if ".mlp." in name and hasattr(model.config, "num_experts_per_tok")]
    lora = peft.LoraConfig(r=config["lora_rank"], lora_alpha=config["lora_alpha"], bias="none",
                           target_modules=kinds(name for name in ours if name not in mlps),
                           target_parameters=[f"{name}.weight" for name in mlps] or None,
                           lora_dropout=config["lora_dropout"], task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(model, lora).train()
    for layer, adapter in ours.items():
        model.get_submodule(f"base_model.model.{layer}.lora_A.default").weight.data.copy_(adapter.A)
    return model


def _ours(name: str) -> str:
    """The package's name of a weight that peft calls so; any other name as it is."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.lora_([AB])\.default\.weight$", r"_lora.\1", name)
