"""The embedded model: a Hugging Face directory with the recipe that makes it."""
