"""Hosts: siblings that map a framework's hooks to the engine."""

from swiftmoe_lightning.strategies import accelerate
from swiftmoe_lightning.strategies.lightning import SwiftMoEStrategy
from swiftmoe_lightning.strategies.registration import register

__all__ = ["SwiftMoEStrategy", "accelerate", "register"]
