"""Prompts taken as they are, for models without a chat format: `rollout.agent.default_agent_loop=roundoff_plain`.

verl infers from `model_type` that a Qwen2 model speaks Qwen's chat format and checks its tokenizer for it; the embedded
model, a Qwen2 with a tokenizer of digits, does not. Here the format is only what the chat template says.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

NAME = "roundoff_plain"
"""Name of the agent loop."""


@register(NAME)
class PlainAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """verl's single-turn loop, whatever the model's family."""

    def __init__(self, *args: Any, hf_model_type: str | None = None, **options: Any) -> None:
        super().__init__(*args, hf_model_type=None, **options)
