"""The adapters in a checkpoint of a LoRA run: merged into the model's weights, and as a folder that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from tp2d_helpers.checkpoint.card import hub_id
from tp2d_helpers.checkpoint.shards import Pieces, whole_weight
from tp2d_helpers.model.engine import load_model
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import SUFFIX, adapter_cut, kinds, targets
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.speed.mixtures import blocks_of_experts

PREFIX = "base_model.model."  # that peft puts before a module's name
# In a mixture, peft takes targets of these names for the experts that transformers 4 had, whatever stands before them
# (`_convert_peft_config_moe`). Dense layers and shared experts have them, too: their weights are named instead.
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def base_model(
    model: ModelFacts, model_name: str, settings: dict[str, Any], trust_remote_code: bool
) -> torch.nn.Module:
    """What training began with. The weights stay mapped files, as far as they have the dtype that was trained in."""
    transformers.set_seed(settings.get("seed", 42))  # what the files lack was drawn from it
    return load_model(model_name, model.config.dtype, trust_remote_code)


class Adapters:
    """The adapters of a checkpoint, whole.

    Args:
        model: what training began with.
        plan: how its weights were divided.
        ranks: each TP rank's shards (`open_shards`).
        settings: the run's, as its config.json has them.
    """

    def __init__(self, model: ModelFacts, plan: Plan, ranks: list[dict[str, Pieces]], settings: dict[str, Any]) -> None:
        self.ranks, self.settings = ranks, settings
        self.rank, self.dtype = settings["lora_rank"], model.config.dtype
        self.meta, self.targets = model.meta, targets(model.meta, settings["lora_targets"])
        # An older version's "all-linear" took routers, too.
        had = {name.removesuffix(f"{SUFFIX}.A") for name in ranks[0] if name.endswith(f"{SUFFIX}.A")}
        if more := had - self.targets.keys():
            self.targets |= {n: s for n, s in targets(model.meta, ",".join(kinds(more))).items() if n in more}
        self.cuts = {name: adapter_cut(plan, name) for name in self.targets}
        # GPT-2's layers keep their weights as [in, out].
        self.transposed = isinstance(model.meta.get_submodule(next(iter(self.targets))), Conv1D)

    def matrices(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, in], B [out, r]) of a layer."""
        inputs, outputs = self.targets[layer]
        shapes = {"A": torch.Size([self.rank, inputs]), "B": torch.Size([outputs, self.rank])}
        names = {kind: f"{layer}{SUFFIX}.{kind}" for kind in shapes}
        cut = self.cuts[layer]
        cuts = {"A": cut if cut and cut.dim == 1 else None, "B": cut if cut and cut.dim == 0 else None}
        return tuple(whole_weight(names[kind], self.ranks, shapes[kind], self.dtype, cuts[kind]) for kind in shapes)

    def changes(self, name: str) -> bool:
        """Whether a weight of the model has an adapter."""
        layer, _, kind = name.rpartition(".")
        return layer in self.targets and kind == "weight"

    def merge(self, name: str, base: torch.nn.Module) -> torch.Tensor:
        """A weight of the model with its adapter: W, or W + s · B A in fp32, rounded once to its dtype.

        Args:
            base: what `base_model` gives.
        """
        found, layer = base.get_parameter(name).detach(), name.rpartition(".")[0]
        if not self.changes(name):
            return found.contiguous()
        A, B = (matrix.float() for matrix in self.matrices(layer))
        product = self.settings["lora_alpha"] / self.rank * B @ A
        return (found.float() + (product.T if self.transposed else product)).to(self.dtype)

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads."""
        folder.mkdir()
        tensors = {}
        for layer in self.targets:
            A, B = self.matrices(layer)
            tensors |= {f"{PREFIX}{layer}.lora_A.weight": A, f"{PREFIX}{layer}.lora_B.weight": B}
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        modules, weights = self._named()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": hub_id(self.settings["model_name"]),
            "r": self.rank,
            "lora_alpha": self.settings["lora_alpha"],
            # Of training alone, and peft can't have it with weights as targets.
            "lora_dropout": 0.0 if weights else self.settings["lora_dropout"],
            "target_modules": modules,
            "fan_in_fan_out": self.transposed,
            "bias": "none",
            "inference_mode": True,
        } | ({"target_parameters": weights} if weights else {})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _named(self) -> tuple[list[str], list[str]]:
        """`target_modules`: by the last parts of their names, where no other module has it; and `target_parameters`."""
        others = kinds(name for name, _ in self.meta.named_modules() if name not in self.targets)
        mixture = bool(blocks_of_experts(self.meta))
        weights = [name for name in self.targets if mixture and name.rpartition(".")[2] in OF_EXPERTS]
        modules = [name for name in self.targets if name not in weights]
        short = {name: last if (last := name.rpartition(".")[2]) not in others else name for name in modules}
        return list(dict.fromkeys(short.values())), [f"{name}.weight" for name in weights]
