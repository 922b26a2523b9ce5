"""One rollout server without Ray; prints what the tests check as JSON. Run by them."""

import asyncio
import json
from pathlib import Path

import verl  # noqa: F401 (activates the plugin)

import roundoff
from roundoff.config import ConfigError
from roundoff.plugins.verl.cpu_server import RolloutServer

TINY = str(Path(roundoff.__file__).parent / "models" / "tiny")
SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


async def main():
    server = RolloutServer(TINY, "float32", replica_rank=0, response_length=24)
    tokenizer = server.loaded.tokenizer
    prompt = tokenizer("8+9=")["input_ids"]
    state = {name: tensor.clone() for name, tensor in server.loaded.model.state_dict().items()}
    await server.collective_rpc("roundoff_announce", args=(1, 0.05))
    await server.update_weights(state, 0)
    outputs = await asyncio.gather(*[server.generate(str(n), prompt, SAMPLED) for n in range(6)])
    await server.collective_rpc("roundoff_evaluation", args=(True,))
    scored = await asyncio.gather(*[server.generate(str(n), prompt, GREEDY) for n in range(3)])
    await server.collective_rpc("roundoff_evaluation", args=(False,))
    again = await server.generate("9", prompt, SAMPLED | {"max_tokens": 1})
    errors = {}
    for name, changed in (
        ("missing", dict(list(state.items())[1:])),
        ("unknown", state | {"extra.weight": state["model.norm.weight"]}),
        ("shape", state | {"model.norm.weight": state["model.norm.weight"][:3]}),
    ):
        try:
            await server.update_weights(changed, 1)
        except ConfigError as error:
            errors[name] = str(error)
    try:
        await server.generate("10", [], SAMPLED)
    except ValueError as error:
        errors["empty prompt"] = str(error)
    result = {
        "responses": [tokenizer.decode(o.token_ids) for o in outputs],
        "logprobs": [o.log_probs for o in outputs],
        "lengths": [len(o.token_ids) for o in outputs],
        "stops": [o.stop_reason for o in outputs],
        "steps": [o.extra_fields["global_steps"] for o in outputs],
        "scored": [tokenizer.decode(o.token_ids) for o in scored],
        "one token": [len(again.token_ids), again.stop_reason],
        "batches": server.batches,
        "errors": errors,
        "report": await server.collective_rpc("roundoff_report", args=("",)),
    }
    print("RESULT", json.dumps(result))


asyncio.run(main())
