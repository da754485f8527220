"""The training step on each backend, and the devices that it runs on."""
