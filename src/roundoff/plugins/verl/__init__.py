"""A plugin for stock verl: the hardware in every actor, reference and rollout process, AQN at each weight sync.

| module | what it holds |
|---|---|
| `settings` | what a process is told, by environment variables |
| `entry`, `entry_point` | activation, by import |
| `engine`, `rows` | the actor and the reference: hardware under FSDP, noise keyed by tokens |
| `trainer`, `reports` | checks of every process; steps, sigma and evaluations announced |
| `aqn_switch` | AQN in a rollout process |
| `cpu_platform`, `cpu_rollout`, `cpu_server`, `plain_prompts` | a whole run on a CPU |
| `vllm_worker` | rollouts by vLLM; never run |
| `command`, `parquet`, `reward` | `roundoff verl-config`, data and rewards |

Only `settings`, `rows`, `aqn_switch`, `reports`, `command`, `parquet` and `reward` can be imported without verl.
"""
