"""README's table of what works with what, made of the tests that prove it: `python -m tests.works_with` rewrites it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent
START, END = "<!-- what works with what: python -m tests.works_with -->", "<!-- end -->"


class Row(NamedTuple):
    """proofs: "file under tests/, without .py: words", each of which is in the name of a test of that file."""

    what: str
    works: str
    notes: str
    proofs: tuple[str, ...]


ROWS: Final = (
    Row(
        "Launch",
        "`python script.py` (popen), torchrun, `accelerate launch`, LightningCLI by name and class path, `devices=1`; "
        "spawn, fork and notebooks (`swiftmoe_notebook`, Accelerate's `notebook_launcher`): whole weights come back",
        "[notebooks](docs/guides/notebooks.md): no tensor parallelism; what `predict` returns stays with the ranks",
        (
            "strategies/test_launch: own_processes torchrun accelerate_launch cli_takes",
            "strategies/test_start_methods: come_back any_start_method ends_all fabric",
            "accelerate/test_launchers: launched_function",
            "test_examples: notebook",
            "strategies/test_fit: trainer_options",
        ),
    ),
    Row(
        "Precision",
        "32-true, 64-true, bf16-mixed, bf16-true, 16-mixed",
        "sharded parameters keep the module's dtype; `param_dtype`, `reduce_dtype` set slots and wire, `token_dtype` "
        "(bfloat16, fp8) tokens on it",
        (
            "strategies/test_precision: 64_bit 16_bit 16_mixed keeps_parameters narrower skip_the_step",
            "engine/test_token_dtype: rounds_in_the_same_places training_equals",
        ),
    ),
    Row(
        "Optimization",
        "automatic, manual, several optimizers, parameter groups, schedulers, accumulation, clipping by norm and value",
        "",
        ("strategies/test_fit: modules trainer_options", "engine/test_update: clipping"),
    ),
    Row(
        "Optimizers",
        "elementwise ones (SGD, Adam, AdamW, RMSprop, Adagrad, ...), default, `foreach`, `fused`; Muon as `sml.Muon`",
        "LBFGS, Adafactor, Shampoo and the like are refused: a shard does not show them the whole tensor; "
        "[Muon](docs/guides/muon.md)",
        (
            "engine/test_update: elementwise fused",
            "engine/test_muon: ranks resumes",
            "strategies/test_fit: muon",
            "strategies/test_launch: whole_tensors",
        ),
    ),
    Row(
        "Stock code on experts",
        "`nn.init`, penalties on weights, hooks, averages and momentum teachers, `save_pretrained` on all ranks",
        "after a write by hand call `engine.mark_stale()`; a copy needs an engine of its own; LocalSGD is refused",
        (
            "distributed/test_dtensor_extension: draw write penalty average_that_is_spread momentum copy_says "
            "step_each",
            "engine/test_gradients: hook",
            "huggingface/test_save_pretrained: all_ranks",
        ),
    ),
    Row(
        "Signals",
        "SIGTERM, and SLURM's signal to requeue, stop all ranks after the same batch",
        "saving then is a few lines: [stopping and resuming](docs/stopping-and-resuming.md)",
        ("strategies/test_sigterm_trainer: sigterm slurm", "strategies/test_sigterm_loops: save"),
    ),
    Row(
        "Lost ranks",
        "torchrun starts ranks again, as many as are left, from the last checkpoint; in plain loops from memory, with "
        "a copy on another node (`MemoryCheckpoint`)",
        "[going on after a lost rank](docs/going-on-after-a-lost-rank.md)",
        ("strategies/test_torchrun_restart: torchrun", "engine/test_memory_checkpoint: torchrun exact_state"),
    ),
    Row(
        "Evaluation",
        "validate, test, predict, also with uneven numbers of batches",
        "in training, ranks need equally many",
        ("strategies/test_evaluation: without_a_fit different_numbers no_batch fewer_training",),
    ),
    Row(
        "Callbacks",
        "WeightAveraging (EMA), StochasticWeightAveraging, ModelCheckpoint, EarlyStopping, freezing and thawing",
        "`BaseFinetuning.unfreeze_and_add_param_group` does not work on experts; `make_trainable` and "
        "`optimizer.add_param_group` do",
        (
            "engine/test_stepped_layers: frozen thaw",
            "strategies/test_fit: callbacks",
            "strategies/test_evaluation: averaged stochastic early_stopping",
            "strategies/test_checkpoints: model_checkpoint averaged",
        ),
    ),
    Row(
        "Loggers, progress bars, profilers",
        "TensorBoard with charts and heat maps, Weights & Biases, MLflow; TQDM and Rich; `PyTorchProfiler` with the "
        "phases of a step",
        "`SimpleProfiler` and `AdvancedProfiler` do not know the phases: [watching](docs/guides/watching.md)",
        (
            "callbacks/test_loggers: tensorboard biases mlflow bars",
            "distributed/test_phase: lightnings_profiler",
        ),
    ),
    Row(
        "Memory",
        "activation checkpointing; experts on the meta device in `configure_model`; experts and optimizer state in the "
        "CPU's memory (`offload_optimizer`), weights of three layers at a time (`reshard_after_forward`), also on one "
        "rank: [big models](docs/guides/big-models.md)",
        "no rank ever holds a whole expert tensor; a GPU's offloading is not tested on one yet",
        (
            "strategies/test_fit: modules",
            "engine/test_engine_setup: meta_experts",
            "engine/test_offload: offloaded",
            "engine/test_memory: bytes",
            "engine/test_streamed_window: three_layers one_process",
        ),
    ),
    Row(
        'Dense part sharded (`dense="fsdp2"`)',
        "Lightning, Fabric, Accelerate, HF Trainer, plain engine; accumulation, clipping, uneven evaluation, "
        'checkpoints of every kind, also to and from `dense="ddp"` and plain DDP',
        "the children of the outermost `nn.ModuleList`s are gathered one by one; evaluation holds the dense weights "
        "whole; averaged weights (EMA, SWA) are refused",
        (
            "engine/test_fully_sharded: thirty_steps whole_files",
            "strategies/test_fully_sharded: fit evaluation checkpoints averaged accelerate fabric trainer",
        ),
    ),
    Row(
        "Several ranks a node (`exchange`)",
        'every framework: `exchange="two_level"` or `"auto"` sends tokens and weights once to a node',
        "nodes of equally many neighbouring ranks; an expert group on one node needs none of it",
        ("engine/test_two_level: thirty_steps resumes", "distributed/test_node_groups: one_level"),
    ),
    Row(
        "Expert groups (`expert_parallel_size`)",
        "Lightning, Fabric, Accelerate, HF Trainer, plain engine, also on a `DeviceMesh` of yours; a tensor-parallel "
        'dense part; `dense="hsdp"`; resume with other groups and numbers of ranks',
        "the auxiliary loss is of each group's own tokens; pipeline parallelism is not supported",
        (
            "engine/test_expert_groups: groups dense_part mesh resumes evaluation stop biases",
            "engine/test_tensor_parallel: one_process",
            "strategies/test_expert_groups: fit checkpoints accelerate fabric trainer",
        ),
    ),
    Row(
        "Tensor parallelism of the dense part",
        "Lightning (`tensor_parallel_size=`), Fabric, Accelerate (`tp_size`), plain engine (`tensor_mesh=`); with "
        "FSDP2 beside it, accumulation, clipping, uneven evaluation, resume at another size",
        "experts are spread over all ranks; pipeline parallelism is refused: [axes](docs/parallel-axes.md)",
        (
            "strategies/test_tensor_parallel: one_process another_tensor_parallel_size fabric",
            "accelerate/test_parallel_axes: one_process refused",
            "engine/test_tensor_parallel: one_process",
        ),
    ),
    Row(
        "Context parallelism",
        "Accelerate (`cp_size`), any loop whose ranks have equal parts of a sequence",
        "attention is the user's, or Accelerate's; not tried on GPUs",
        ("accelerate/test_parallel_axes: parts_of_a_sequence",),
    ),
    Row(
        "Adapters (LoRA)",
        "PEFT's, on dense layers and on experts, over frozen experts: it saves, loads and merges as PEFT's own does",
        "one adapter on experts at a time; without dropout, DoRA or biases: [LoRA on experts](docs/guides/lora.md)",
        (
            "huggingface/test_peft_adapters: peft_alone one_device only_factors several_adapters",
            "engine/test_engine_setup: adapter",
        ),
    ),
    Row(
        "Quantized experts",
        "refused",
        "keep them in float32, bfloat16 or float16",
        ("engine/test_engine_setup: quantized", "huggingface/test_convert: named"),
    ),
    Row(
        "Routing replay (R3)",
        "record and replay the experts of every token: `sml.MoE` with any top-k router, converted Hugging Face models; "
        "activation checkpointing, micro-batches, capacity, ranks; arrays of vLLM and SGLang",
        "compiled modules run eagerly meanwhile; Llama 4's router is refused: "
        "[routing replay](docs/guides/routing-replay.md)",
        (
            "modules/test_routing_replay: plain_torch own_recording checkpointing any_router compiled arrays",
            "modules/test_replayed_forwards: one_input",
            "engine/test_routing_replay: two_ranks",
            "huggingface/test_routing_replay: converted live_scores",
        ),
    ),
    Row(
        'Sharded evaluation (`evaluate="sharded"`)',
        "Lightning, plain engine, converted Hugging Face models; every kind of experts, adapters, groups, FSDP2, "
        "offloading, two levels; uneven batches, `generate`, also with `synced_gpus=True`",
        "activations that mix hidden units are refused; a capacity is not applied: "
        "[evaluation](docs/guides/evaluation.md)",
        (
            "engine/test_sharded_evaluation: training_goes_on any_numbers",
            "engine/test_hidden_pieces: every_kind",
            "strategies/test_sharded_evaluation: averaged",
            "huggingface/test_generation_on_ranks: uneven_generation",
        ),
    ),
    Row(
        "Compilation",
        '`torch.compile` of the module or of blocks; of a model with `experts_implementation="swiftmoe"` as one graph',
        "graphs end at each exchange of tokens, no recompilation from step to step",
        (
            "strategies/test_compiled_module: compiled",
            "engine/test_compiled: compiled",
            "huggingface/test_experts: compile",
        ),
    ),
    Row(
        "Checkpoints",
        "one plain file, or a directory (`save_distributed_checkpoint=True`)",
        "a plain file loads without this package, into DDP and back; either resumes at any number of ranks",
        ("strategies/test_checkpoints: goes_on to_the_bit ordinary directory_becomes truncated",),
    ),
    Row(
        "Fabric",
        "`setup`, `setup_module`, `backward`, `no_backward_sync`, `clip_gradients`, `save`, `load`, in full precision, "
        "bf16-mixed and 16-mixed",
        'files go on under `strategy="ddp"` and back',
        ("strategies/test_fabric: plain_ddp one_after_the_other file_goes_on bf16 16_mixed",),
    ),
    Row(
        "Accelerate",
        "`accumulate`, `backward`, clipping by norm and value, schedulers, bf16, fp16, trackers, `save_state`, "
        "`load_state`, `get_state_dict`, `unwrap_model`",
        "folders go on under plain Accelerate and back; `ParallelismConfig` is read; DeepSpeed, FSDP and Megatron-LM "
        "are refused",
        (
            "accelerate/test_prepare: plain_accelerate four_ranks fp16 trackers folder",
            "accelerate/test_prepare_misuse: misuse another_parallelism",
            "accelerate/test_accelerate_scripts: scripts_of_accelerate_pass",
        ),
    ),
    Row(
        "HF Trainer",
        "`TrainingArguments` with accumulation, clipping, bf16, fp16, activation checkpointing, evaluation, `predict`, "
        "`load_best_model_at_end`; resume at any number of processes",
        "checkpoints load with `from_pretrained`; DeepSpeed, FSDP and `even_batches=False` are refused; "
        "`save_model` on all processes",
        ("huggingface/test_trainer: plain_trainer resumes", "huggingface/test_trainer_misuse: misuse deepspeed"),
    ),
    Row(
        'transformers\' own expert parallelism (`ep_implementation="swiftmoe"`)',
        "6 families, any number of experts, several groups, HSDP, tensor parallel dense parts; `transformers.Trainer`, "
        "plain loops, distributed checkpoints; `SwiftMoETrainer` resumes at any number of ranks and any `ep_size`",
        "from transformers 5.24; `SwiftMoETrainer` refuses fp16; `tp_size` is tested in plain loops; an auxiliary loss "
        "is of each rank's own tokens",
        ("huggingface/test_expert_parallel: one_process own_trainer resumes distributed_checkpoint refused",),
    ),
    Row(
        "Hugging Face models",
        "tiny random ones of 13 families on one device, 6 of them over ranks; in a LightningModule",
        "the auxiliary loss is of each rank's own tokens, as under DDP",
        (
            "huggingface/test_convert: equal_the_original saves_loads",
            "huggingface/test_converted_under_engine: ten_steps",
            "huggingface/test_converted_under_lightning: ten_steps",
        ),
    ),
    Row(
        "Routers",
        "top-k, group-limited (DeepSeek-V2 and V3, to the bit), jitter, noisy top-k, sinkhorn, hash, clustered, "
        "expert choice",
        "sinkhorn and expert choice are of each rank's own tokens: [routers](docs/guides/routers.md)",
        (
            "modules/test_routers: deepseek_v3s noise megatrons hash choice",
            "modules/test_clustered_router: every_cluster",
            "engine/test_routers_on_ranks: equal",
        ),
    ),
    Row(
        "Padding (`moe(x, mask=mask)`)",
        "left out of routing, counts, capacity and losses; ranks with different numbers of tokens; `torch.compile`",
        "a forward with a mask waits for the GPU once",
        ("modules/test_real_tokens: padding compiled", "engine/test_routers_on_ranks: mask"),
    ),
    Row("Modules without experts", "train as under DDP, to the bit", "", ("strategies/test_fit: without_experts",)),
)


def path_of(proof: str) -> str:
    """The proof's file, from the root. Raises ValueError for a word that is in no test's name."""
    file, words = proof.split(":")
    path = f"tests/{file}.py"
    tree = ast.parse((ROOT / path).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    for word in words.split():
        if not any(word in name for name in names):
            raise ValueError(f"no test in {path} is about {word!r}: README must not claim what nothing proves.")
    return path


def table() -> str:
    """The Markdown between the two comments."""
    lines = ["| | works | notes | proved by |", "|---|---|---|---|"]
    for row in ROWS:
        paths = [path_of(proof) for proof in row.proofs]
        links = ", ".join(f"[{Path(path).stem.removeprefix('test_')}]({path})" for path in paths)
        lines.append(" | ".join(["", row.what, row.works, row.notes, links, ""]).strip())
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """`readme` with the table as it should be."""
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text()))
