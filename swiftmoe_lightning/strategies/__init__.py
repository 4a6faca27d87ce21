"""Lightning: strategies of its Trainer and of Fabric, which map their hooks to the engine."""

from swiftmoe_lightning.strategies import private as private
from swiftmoe_lightning.strategies.fabric import SwiftMoEFabricStrategy
from swiftmoe_lightning.strategies.lightning import SwiftMoEStrategy
from swiftmoe_lightning.strategies.registration import register

__all__ = ["SwiftMoEFabricStrategy", "SwiftMoEStrategy", "register"]
