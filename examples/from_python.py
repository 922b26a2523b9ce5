"""Scores the embedded model with MXFP4 weights and activations, and without: `python examples/from_python.py`."""

import roundoff

loaded = roundoff.load_model("tiny")  # or a local Hugging Face directory
hardware = roundoff.Hardware(precision=roundoff.Precision(weight="mxfp4", activation="mxfp4"))
installed = roundoff.install(loaded.model, hardware, seed=0)
print(installed.summary())

task = roundoff.TASKS["arithmetic"]({"test_problems": 256})
evaluation = roundoff.evaluate(loaded.model, loaded.tokenizer, task, key=roundoff.Key.from_seed(0), max_new_tokens=24)
print(f"deployed {evaluation.deployed:.1%}, clean {evaluation.clean:.1%}")
