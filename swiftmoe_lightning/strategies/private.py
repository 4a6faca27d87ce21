"""Names of Lightning that are not public and that are needed here."""

from __future__ import annotations

from lightning.fabric import strategies as fabric_strategies
from lightning.fabric.strategies import launchers as fabric_launchers
from lightning.fabric.strategies import strategy as fabric_strategy
from lightning.fabric.utilities import imports
from lightning.pytorch import strategies
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides import distributed
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from swiftmoe_lightning.private_names import check_names

check_names(
    "lightning",
    {
        # To wrap a module, or to broadcast the parameters of one that DDP does not wrap.
        strategies.DDPStrategy: ["_setup_model", "_configure_launcher"],
        distributed: ["_sync_module_states"],
        fabric_strategies.DDPStrategy: [
            "_determine_ddp_device_ids",
            "_convert_stateful_objects_in_state",
            "_configure_launcher",
        ],
        fabric_strategy: ["_BackwardSyncControl"],
        # To bring weights back from ranks that spawn or fork started.
        _MultiProcessingLauncher: ["_collect_rank_zero_results", "_recover_results_in_main_process"],
        fabric_launchers: ["_MultiProcessingLauncher"],
        imports: ["_IS_INTERACTIVE"],
        # To stop a run at a signal.
        _SignalConnector: ["_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"],
        _TrainingEpochLoop: ["_should_accumulate", "_num_ready_batches_reached", "_should_check_val_fx"],
    },
    "lightning>=2.6,<3",
)
