"""What the fork server imports once, so that every rank of every test starts with it."""

import lightning.pytorch
import torch.distributed.checkpoint
import torch.distributed.tensor
import torch.testing

import swiftmoe_lightning

__all__ = ["lightning", "swiftmoe_lightning", "torch"]
