"""The embedded model `tiny`: a Hugging Face directory, and the recipe that builds it.

This directory holds the weights, the configuration and the tokenizer. They are loaded like any local model
(`roundoff.models.load`).

Doors: `recipe.build`.
"""
