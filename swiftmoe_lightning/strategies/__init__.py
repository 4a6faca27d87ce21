"""Strategies of Lightning's Trainer and of Fabric, which map the frameworks' hooks to the engine."""

from swiftmoe_lightning.strategies import private as private
from swiftmoe_lightning.strategies.fabric import SwiftMoEFabricStrategy
from swiftmoe_lightning.strategies.lightning import SwiftMoEStrategy
from swiftmoe_lightning.strategies.registration import register

__all__ = ["SwiftMoEFabricStrategy", "SwiftMoEStrategy", "register"]
