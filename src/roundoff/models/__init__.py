"""Language models: loading them, and the embedded model `tiny`."""
