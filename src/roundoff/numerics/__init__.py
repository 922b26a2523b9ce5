"""Number formats, quantize-dequantize, and noise from a counter-based generator."""
