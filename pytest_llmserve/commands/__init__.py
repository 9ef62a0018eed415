"""Sub-commands of `llmserve`, one module each: `add_parser` and the work."""
