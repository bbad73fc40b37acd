"""A served model as a transformers model: `tallystick.AutoModelForCausalLM`. Needs the extra: tallystick[torch]."""
