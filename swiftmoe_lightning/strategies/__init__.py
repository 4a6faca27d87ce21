"""Hosts: siblings that map a framework's hooks to the engine."""

from swiftmoe_lightning.strategies import accelerate
from swiftmoe_lightning.strategies.fabric import SwiftMoEFabricStrategy
from swiftmoe_lightning.strategies.lightning import SwiftMoEStrategy
from swiftmoe_lightning.strategies.registration import register

__all__ = ["SwiftMoEFabricStrategy", "SwiftMoEStrategy", "accelerate", "register"]
