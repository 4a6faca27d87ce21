"""`python -m swiftmoe_lightning` is the `swiftmoe` command."""

from swiftmoe_lightning.cli import main

main()
