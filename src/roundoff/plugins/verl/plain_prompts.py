"""An agent loop for models without a chat format: `rollout.agent.default_agent_loop=roundoff_plain`.

verl concludes from `model_type` that a Qwen2 model uses Qwen's chat format, and checks its tokenizer for it. The
embedded model is a Qwen2 whose tokenizer knows little more than digits, and does not use it. Here the chat template
alone decides the format.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

NAME = "roundoff_plain"
"""Name of the agent loop."""


@register(NAME)
class PlainAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """verl's single-turn loop, without its assumptions about the model's family."""

    def __init__(self, *args: Any, hf_model_type: str | None = None, **options: Any) -> None:
        super().__init__(*args, hf_model_type=None, **options)
