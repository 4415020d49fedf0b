"""What the package uses of other libraries' insides: a test each, which fails by name when a library changes it.

The table in `tests/README.md` says why each is used and what breaks without it.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import ROOT

CHECKS: dict[str, Callable[[], None]] = {}


def interface(name: str) -> Callable:
    """Register a check under the name that the table has."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = check
        return check

    return register


def has(thing: Any, *names: str) -> None:
    """Attributes of a class or module; of a class also those that its methods assign to `self`."""
    assigned = set()
    with contextlib.suppress(OSError, TypeError):  # a class in C++, a module
        assigned = set(re.findall(r"self\.(\w+)\b[^=\n]*=", inspect.getsource(thing)))
    missing = [name for name in names if not hasattr(thing, name) and name not in assigned]
    assert not missing, f"{thing} has no {missing}"


def takes(function: Callable, *names: str) -> None:
    """Parameters of a function, in this order at its beginning."""
    found = list(inspect.signature(function).parameters)
    assert found[: len(names)] == list(names), f"{function} takes {found}"


@interface("ray_constants.ENABLE_RAY_CLUSTER")
def ray_on_loopback() -> None:
    from ray._private import ray_constants, services

    has(ray_constants, "ENABLE_RAY_CLUSTER")
    assert "ray_constants.ENABLE_RAY_CLUSTER" in inspect.getsource(services.get_node_ip_address)


@interface("get_cluster_metadata")
def ray_answers() -> None:
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient

    takes(get_cluster_metadata, "gcs_client")
    takes(canonicalize_bootstrap_address_or_die, "addr")
    assert callable(GcsClient)


@interface("uv_runtime_env_hook")
def ray_under_uv() -> None:
    from ray._private import ray_constants, worker
    from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline

    from tp2d_helpers.preflight.connection import UV

    takes(_get_uv_run_cmdline)
    has(ray_constants, UV)
    assert f"ray_constants.{UV}" in inspect.getsource(worker._maybe_modify_runtime_env)


@interface("RAY_JOB_CONFIG_JSON_ENV_VAR")
def ray_job() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    from tp2d_helpers.preflight.connection import JOB

    assert JOB == RAY_JOB_CONFIG_JSON_ENV_VAR


@interface("available_resources_per_node")
def ray_state() -> None:
    from ray._private import state

    takes(state.available_resources_per_node)
    takes(state.jobs)
    assert all(name in inspect.getsource(state.GlobalState.job_table) for name in ("DriverIPAddress", "Entrypoint"))


@interface("dynamic_module_utils")
def transformers_code_files() -> None:
    from transformers import PreTrainedModel
    from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

    takes(custom_object_save, "obj", "folder", "config")
    takes(get_relative_import_files, "module_file")
    assert not PreTrainedModel.is_remote_code()


@interface("RAY_TRAIN_METRICS_ENABLED")
def ray_metrics() -> None:
    from ray.train.v2._internal.constants import METRICS_ENABLED_ENV_VAR

    from tp2d_helpers.launch import RAY_METRICS

    assert RAY_METRICS == METRICS_ENABLED_ENV_VAR


@interface("torch.utils._pytree")
def torch_pytree() -> None:
    from torch.utils import _pytree

    takes(_pytree.tree_leaves, "tree")
    takes(_pytree.tree_map_only, "type_or_types_or_pred", "func", "tree")
    assert "is_leaf" in inspect.signature(_pytree.tree_map_only).parameters


@interface("TorchTrainer._initialize_and_run_controller")
def ray_controller() -> None:
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.controller import TrainController

    assert "_initialize_and_run_controller" in inspect.getsource(TorchTrainer.fit)
    assert {"failure_policy", "scaling_policy"} <= set(inspect.signature(TrainController.__init__).parameters)


@interface("DefaultFailurePolicy._is_retryable_error")
def ray_failure_policy() -> None:
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy

    takes(DefaultFailurePolicy._is_retryable_error, "self", "training_failed_error")


@interface("health_check_failure")
def ray_worker_death() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata

    has(WorkerHealthCheckFailedError, "health_check_failure")
    said = str(ActorMetadata("host", "id", "10.0.0.3", 7, {}))
    assert "hostname='host'" in said and "node_ip='10.0.0.3'" in said and "pid=7" in said


@interface("ElasticScalingPolicy._count_possible_workers")
def ray_scaling_policy() -> None:
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

    takes(ElasticScalingPolicy._count_possible_workers, "self", "reserved_resources")
    has(ElasticScalingPolicy, "make_decision_for_non_running_worker_group")
    assert inspect.isclass(NoopDecision)


@interface("checkpoint_manager_snapshot.json")
def ray_snapshot() -> None:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    assert {"checkpoint_dir_name", "metrics"} <= set(_TrainingResultState.model_fields)
    needed = {"ray_version", "checkpoint_results", "latest_checkpoint_result", "checkpoint_report_indices"}
    assert needed <= set(_CheckpointManagerState.model_fields)


@interface("deepspeed.ops.__compatible_ops__")
def deepspeed_ops() -> None:
    import deepspeed.ops

    has(deepspeed.ops, "__compatible_ops__")


@interface("module_inject.layers")
def deepspeed_layers() -> None:
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, TensorParallel_Layer, VocabParallelLinear

    has(TensorParallel_Layer, "mp_group", "is_tp_parallel")
    has(VocabParallelLinear, "vocab_start_index")
    assert issubclass(LinearLayer, TensorParallel_Layer) and issubclass(LinearAllreduce, TensorParallel_Layer)


@interface("module_inject.auto_tp.AutoTP")
def deepspeed_autotp() -> None:
    from deepspeed.module_inject import layers
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.runtime.tensor_parallel.config import AUTOTP_MODE, _get_hf_tp_plan
    from deepspeed.sequence.cross_entropy import validate_vocab_parallel_loss

    has(AutoTP, "_resolve_vocab_parallel_lm_head", "update_linear_policies", "_replace_module", "_get_model_type")
    takes(AutoTPConfig.find_matching_spec, "self", "param_name", "model_type")
    takes(TPPlanConverter.convert, "hf_tp_plan")
    takes(_get_hf_tp_plan, "model")
    takes(validate_vocab_parallel_loss, "model")
    has(layers, "DEEPSPEED_AUTOTP_MODE", "VocabParallelEmbedding")
    has(AUTOTP_MODE, "TRAINING")
    source = inspect.getsource(AutoTP.register_replicated_grad_hooks)
    assert "find_matching_spec(param_name, model_type)" in source and "spec.grad_allreduce" in source


@interface("_hp_mapping")
def deepspeed_masters() -> None:
    from deepspeed.runtime.zero import partition_parameters, stage_1_and_2
    from deepspeed.utils import tensor_fragment

    has(tensor_fragment, "get_hp_fragment")
    assert "_hp_mapping = None" in inspect.getsource(stage_1_and_2)
    for name in ("ds_tensor", "ds_numel", "ds_process_group"):
        assert f"param.{name} = " in inspect.getsource(partition_parameters)


@interface("DeepSpeedZeroOptimizer's attributes")
def deepspeed_zero() -> None:
    from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

    has(
        DeepSpeedZeroOptimizer, "micro_step_id", "_global_grad_norm", "overflow", "clip_grad", "bit16_groups",
        "free_grad_in_param_list", "params_not_in_partition", "params_in_partition", "averaged_gradients",
        "process_gradients", "reduce_gradients", "overlapping_partition_gradients_reduce_epilogue",
        "partition_gradients", "_epilogue_ran_this_backward",
        "_lazy_init_hp_params_optimizer_state", "bit16_groups_flat", "real_dp_process_group",
        "parallel_partitioned_bit16_groups", "nccl_start_alignment_factor", "allgather_bucket_size",
        "dp_process_group", "_model_parallel_all_reduce", "model_parallel_rank", "single_partition_of_fp32_groups",
    )  # fmt: skip
    assert "groups_flat" in inspect.signature(all_gather_dp_groups).parameters
    takes(is_model_parallel_parameter, "p")
    assert isinstance(INITIAL_MICRO_STEP_ID, int)


@interface("engine.checkpoint_engine")
def deepspeed_checkpoint_engine() -> None:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    assert "self.checkpoint_engine.save(" in inspect.getsource(DeepSpeedEngine)
    takes(TorchCheckpointEngine.save, "self", "state_dict", "path")
    takes(TorchCheckpointEngine.load, "self", "path", "map_location")


@interface("ds_to_universal.main")
def deepspeed_universal() -> None:
    from deepspeed.checkpoint import ds_to_universal

    takes(ds_to_universal.main, "args")
    asked = set(re.findall(r"args\.(\w+)", inspect.getsource(ds_to_universal)))
    assert asked <= {
        "input_folder", "output_folder", "num_extract_workers", "num_merge_workers", "keep_temp_folder", "strict",
        "inject_missing_state",
    }  # fmt: skip


@interface("load_hp_checkpoint_state_from_checkpoint_dir_stage3")
def deepspeed_universal_stage_3() -> None:
    from deepspeed.checkpoint import constants, ds_to_universal
    from deepspeed.runtime import base_optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    has(constants, "PARAM", "PARAM_GROUPS", "PARAM_SHAPES", "OPTIMIZER_STATE_DICT", "FP32_FLAT_GROUPS", "DS_VERSION")
    loading = inspect.getsource(Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3)
    assert "optim_sd[OPTIMIZER_STATE_DICT]['state'][0]['step']" in loading  # one tensor for all groups
    assert 'optim_sd[OPTIMIZER_STATE_DICT]["param_groups"][0]' in loading
    assert "loaded_checkpoint_state = ckpt_dict[PARAM]" in inspect.getsource(Stage3.load_hp_checkpoint_state)
    assert "optim_sd['param_groups']" in inspect.getsource(base_optimizer)
    assert "sd.get(DS_VERSION, False)" in inspect.getsource(DeepSpeedZeroOptimizer._load_global_state)
    assert "_save_checkpoint(final_path, slices[0])" in inspect.getsource(ds_to_universal.merge_zero3_slices)


@interface("_ds_grad_allreduce_registered")
def deepspeed_gradient_hooks() -> None:
    from deepspeed.module_inject.auto_tp import AutoTP

    source = inspect.getsource(AutoTP.register_replicated_grad_hooks)
    assert 'if getattr(param, "_ds_grad_allreduce_registered", False):\n                continue' in source


@interface("_set_param_uc_meta")
def deepspeed_universal_metadata() -> None:
    from deepspeed.module_inject import layers

    known = inspect.signature(layers.TensorParallel_Layer._set_param_uc_meta).parameters
    used = ("param", "partition_type", "partition_dim", "logical_shape", "output_shape", "partition_sizes")
    assert {"self", *used, "original_shape"} <= set(known)
    assert 'marker = getattr(module, "_mark_uc_metadata", None)' in inspect.getsource(
        layers.collect_autotp_universal_checkpoint_info
    )


@interface("ds_shape")
def deepspeed_stage_3() -> None:
    from deepspeed.runtime.zero import partition_parameters

    assert "param.ds_shape = param.shape" in inspect.getsource(partition_parameters)


@interface("torch.distributed._symmetric_memory")
def torch_symmetric_memory() -> None:
    import torch.distributed._symmetric_memory as symmetric_memory

    has(symmetric_memory, "empty", "rendezvous", "_SymmetricMemory")
    names = "stream_write_value32", "wait_signal", "get_buffer", "get_signal_pad", "barrier"
    has(symmetric_memory._SymmetricMemory, *names)


@interface("torch._functorch.config")
def torch_what_is_kept() -> None:
    from torch._functorch import config, partitioners

    has(config, "ban_recompute_materialized_backward")
    assert "config.ban_recompute_materialized_backward" in inspect.getsource(partitioners)


@interface("torch._foreach_norm")
def torch_foreach_norm() -> None:
    """With a dtype to compute in, which `torch.nn.utils.get_total_norm` lacks: it rounds to 33.5 here."""
    ones = [torch.full((1100,), 1 + 2**-7, dtype=torch.bfloat16)]
    exact = 1100**0.5 * (1 + 2**-7)  # 33.43
    assert torch._foreach_norm(ones, 2, dtype=torch.float32)[0].item() == pytest.approx(exact, rel=2e-4)
    assert torch.nn.utils.get_total_norm(ones).item() != pytest.approx(exact, rel=2e-4)


@interface("torch._dynamo.maybe_mark_dynamic")
def torch_dynamic_sizes() -> None:
    """Counts where everything else is static; `speed/test_varlen.py` has a model that is compiled once."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    double = torch.compile(lambda x: 2 * x, dynamic=False, backend=backend)
    for size in (3, 4, 5):
        tensor = torch.ones(size)
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        double(tensor)
    assert len(graphs) == 1


@interface("masking_utils")
def transformers_masks() -> None:
    from transformers import masking_utils

    takes(masking_utils.find_packed_sequence_indices, "position_ids")
    assert callable(masking_utils.is_tracing)
    for name in ("find_packed_sequence_indices(", "is_tracing("):  # called as the module's, so that ours is what runs
        assert inspect.getsource(masking_utils).count(name) > 1


@interface("_keep_in_fp32_modules")
def transformers_kept() -> None:
    """Of a class, and of the parts of a model; DeepSpeed reads them for buffers."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedModel

    from tp2d_helpers.model.kept import kept_in_fp32

    has(PreTrainedModel, "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    with torch.device("meta"):
        model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(num_hidden_layers=2))
    assert kept_in_fp32(model, torch.bfloat16)


@interface("rope_type")
def transformers_ropes() -> None:
    """What a rope's module goes by, when it asks for the length of what is read."""
    from transformers.modeling_rope_utils import dynamic_rope_update
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    source = inspect.getsource(dynamic_rope_update)
    assert "self.rope_type" in source and '"dynamic" in rope_type' in source and 'rope_type == "longrope"' in source
    assert 'self.config.rope_parameters["rope_type"] != "default"' in inspect.getsource(PhimoeRotaryEmbedding)


@interface("convert_and_load_state_dict_in_model")
def transformers_loading() -> None:
    """`from_pretrained` loads by the same calls, in the same order."""
    from transformers import PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils

    takes(conversion_mapping.get_model_conversion_mapping, "model", "key_mapping")
    takes(core_model_loading.convert_and_load_state_dict_in_model, "model", "state_dict", "load_config")
    takes(modeling_utils.LoadStateDictConfig.__init__, "self")
    has(modeling_utils.LoadStateDictConfig(), "device_map", "dtype", "weight_mapping")
    source = inspect.getsource(PreTrainedModel._load_pretrained_model)
    source += inspect.getsource(PreTrainedModel._finalize_model_loading)
    calls = ("convert_and_load_state_dict_in_model(", "mark_tied_weights_as_initialized(loading_info)",
             "tie_weights(missing_keys=loading_info.missing_keys, recompute_mapping=False)",
             "_adjust_missing_and_unexpected_keys(loading_info)")  # fmt: skip
    places = [source.find(call) for call in calls]
    assert -1 not in places and places == sorted(places)


@interface("revert_weight_conversion")
def transformers_published_names() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", hidden_size=64, num_hidden_layers=1))
    head = {"lm_head.weight": model.lm_head.weight}
    assert list(revert_weight_conversion(model, head)) == ["embed_out.weight"]


@interface("_weight_conversions")
def transformers_conversions_of_a_load() -> None:
    from transformers import core_model_loading

    source = inspect.getsource(core_model_loading)
    assert "model._weight_conversions = " in source and 'getattr(model, "_weight_conversions", None)' in source


@interface("MmBackward0")
def autograd_names_of_products() -> None:
    from tp2d_helpers.model.decay import FACTORS

    a, b, c = (torch.zeros(2, 2, 2, requires_grad=True) for _ in range(3))
    products = [a[0] @ b[0], torch.bmm(a, b), torch.addmm(a[0], b[0], c[0]), torch.baddbmm(a, b, c),
                torch.conv1d(a, b), torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), a[0])]  # fmt: skip
    assert {product.grad_fn.name() for product in products} == FACTORS.keys() - {"GroupedMmBackward0"}


@interface("_convert_peft_config_moe")
def peft_names_of_experts() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    from tp2d_helpers.checkpoint.adapters import OF_EXPERTS

    known = conversion._MOE_TARGET_MODULE_MAPPING.values()
    assert set().union(*known) == set(OF_EXPERTS)


@interface("_render_traceback_")
def ipython_traceback() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    assert "_render_traceback_" in inspect.getsource(InteractiveShell.showtraceback)


@pytest.mark.parametrize("name", CHECKS)
def test_interface(name: str) -> None:
    CHECKS[name]()


def test_the_table_names_them_all() -> None:
    text = (ROOT / "tests/README.md").read_text()
    table = text[text.index("## Private interfaces") :]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.M)) == set(CHECKS)
