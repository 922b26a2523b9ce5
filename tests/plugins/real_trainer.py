"""A real `GRPOTrainer` of trl on the embedded model: two steps, each with an evaluation."""

import pytest

from roundoff.models.load import load_model


def real_trainer(tmp_path, callback):
    trl = pytest.importorskip("trl", reason="trl is not installed here: pip install 'roundoff[trl]'")
    datasets = pytest.importorskip("datasets")
    loaded = load_model("tiny")
    prompts = [f"{n}+{n}=" for n in range(1, 17)]
    return trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=lambda completions, **_: [float(len(text) == 2) for text in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            num_generations=4,
            num_generations_eval=1,
            max_completion_length=8,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to=[],
            beta=0.01,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        eval_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=loaded.tokenizer,
        callbacks=[callback],
    )
