"""The public names and the signatures that users write; a change here is a change to the documentation, too."""

from __future__ import annotations

import inspect

import swiftmoe_lightning as sml

NAMES = [
    "ClusteredRouter",
    "ExpertChoiceRouter",
    "ExpertPopularityMonitor",
    "Experts",
    "Forecast",
    "GroupLimitedRouter",
    "HashRouter",
    "JitterRouter",
    "LayerLoad",
    "LoadReader",
    "MemoryCheckpoint",
    "MoE",
    "Muon",
    "NoisyTopKRouter",
    "Placement",
    "PlacementPolicy",
    "PlacementRecorder",
    "RouterOutput",
    "SequenceClusters",
    "SinkhornRouter",
    "SwiftMoEConfig",
    "SwiftMoEEngine",
    "SwiftMoEFabricStrategy",
    "SwiftMoEStrategy",
    "SwiftMoETrainer",
    "TopKRouter",
    "accelerate",
    "auxiliary_loss",
    "convert",
    "muon_groups",
    "record_routing",
    "register_hf_experts",
    "replay_routing",
    "routing_from_array",
    "routing_to_array",
]


def arguments(call: object) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name != "self"]  # type: ignore[arg-type]


def test_all_is_what_it_was() -> None:
    assert sorted(sml.__all__) == NAMES
    assert all(hasattr(sml, name) for name in NAMES)


def test_signatures_are_what_they_were() -> None:
    assert arguments(sml.MoE) == [
        "dim",
        "hidden_dim",
        "num_experts",
        "top_k",
        "activation",
        "router",
        "capacity_factor",
        "capacity_per",
        "num_shared_experts",
        "aux_loss_coef",
        "z_loss_coef",
        "bias",
        "device",
        "dtype",
    ]
    assert arguments(sml.MoE.forward) == ["x", "mask", "token_ids", "cluster_ids"]
    assert arguments(sml.Experts.forward) == ["hidden_states", "top_k_index", "top_k_weights"]
    assert arguments(sml.MemoryCheckpoint) == ["engine", "optimizers", "folder"]
    assert arguments(sml.MemoryCheckpoint.save) == ["step", "extra"]
    assert arguments(sml.convert) == ["model"]
    assert arguments(sml.record_routing) == ["model"]
    assert arguments(sml.register_hf_experts) == ["config"]
    assert arguments(sml.replay_routing) == ["model", "routing"]
    assert arguments(sml.routing_from_array) == ["array", "model"]
    assert arguments(sml.routing_to_array) == ["routing"]
    options = [
        "slots_per_rank",
        "placement",
        "replace_every",
        "token_split",
        "exchange",
        "dense",
        "expert_parallel_size",
        "param_dtype",
        "reduce_dtype",
        "token_dtype",
        "offload_optimizer",
        "reshard_after_forward",
        "evaluate",
    ]
    assert arguments(sml.SwiftMoEConfig) == options
    strategy = arguments(sml.SwiftMoEStrategy)
    assert sorted(strategy) == sorted([*options, "tensor_parallel_size", "save_distributed_checkpoint", "ddp_options"])


def test_fabrics_strategy_has_the_options_and_defaults_of_the_trainers() -> None:
    ours, trainers = (inspect.signature(s).parameters for s in (sml.SwiftMoEFabricStrategy, sml.SwiftMoEStrategy))
    assert [p for name, p in ours.items() if name != "parallelize_fn"] == [
        p for name, p in trainers.items() if name != "save_distributed_checkpoint"
    ]
