"""What loads tuners into other programs: a node for ComfyUI and an extension for Forge."""
