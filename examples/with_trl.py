"""AQN and MXFP4 weights inside trl's GRPOTrainer: `pip install 'roundoff[trl]'`, then `python examples/with_trl.py`."""

import sys
import tempfile

from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import roundoff
from roundoff.plugins.trl import AqnCallback, install_in_trainer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 8

loaded = roundoff.load_model("tiny")  # or a local Hugging Face directory
task = roundoff.TASKS["arithmetic"]({"train_problems": 512, "test_problems": 64})
problems = {problem.prompt: problem for problem in (*task.train(), *task.test())}


def reward(prompts, completions, **_):
    """The task's own reward."""
    return [task.reward(problems[prompt], text) for prompt, text in zip(prompts, completions, strict=True)]


aqn = roundoff.AQN(sigma_start=0.02, sigma_end=0.0002, schedule="global", stages=4)
callback = AqnCallback(aqn, seed=0)
trainer = GRPOTrainer(
    model=loaded.model,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_generations=8,
        num_generations_eval=1,
        max_completion_length=24,
        learning_rate=1e-4,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": [problem.prompt for problem in task.train()]}),
    eval_dataset=Dataset.from_dict({"prompt": [problem.prompt for problem in task.test()]}),
    processing_class=loaded.tokenizer,
    callbacks=[callback],
)
hardware = roundoff.Hardware(precision=roundoff.Precision(weight="mxfp4"))
print(install_in_trainer(trainer, hardware, seed=0).summary())
trainer.remove_callback(PrinterCallback)
trainer.train()

for row in trainer.state.log_history:
    if "eval_reward" in row:  # with the hardware, without AQN
        print(f"step {row['step']}: evaluation reward {row['eval_reward']:.3f}")
    elif "reward" in row:
        print(f"step {row['step']}: reward {row['reward']:.3f}, sigma {callback.sigmas[row['step']]:.4f}")
