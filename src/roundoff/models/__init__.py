"""A language model, its tokenizer, and one forward pass through it.

Here: loading and checking a model directory, the embedded models `tiny` and `tiny-long`, LoRA adapters, prompts as
token ids, positions and masks of a batch, the log-probabilities of a response, and calibration batches. Not here: the
simulated arithmetic (`roundoff.hardware`), generation (`roundoff.sampling`), scoring (`roundoff.evaluation`) and
updates (`roundoff.training`).

Doors: `embedded`, `load.load_model`, `load.LoadedModel`, `prompts.encode`, `prompts.check_asked`,
`logprobs.token_logprobs`, `draws.noise_context`, `masks`, `lora`, `calibration`, `mode.evaluation_mode`,
`gradient_checkpointing.checkpointed`, `device.resolve_device`, `tokenizer`, `position_limit`,
`keyed_dropout.dropout_on`, `weights.weights_digest`, `adapter_file.read_adapter`, and `tiny.recipe.build`.
"""
