"""A plugin for stock verl: the hardware in every actor, reference and rollout process, and AQN at each weight sync.

| module | content |
|---|---|
| `settings` | the settings of a process, which it reads from environment variables |
| `entry`, `entry_point` | activation, by import |
| `engine`, `rows` | actor and reference: the hardware of training under FSDP, noise keyed by tokens |
| `trainer`, `reports` | the trainer: it checks every process, and announces steps, sigma and evaluations |
| `aqn_switch` | AQN in a rollout process |
| `cpu_platform`, `cpu_rollout`, `cpu_server`, `plain_prompts` | a whole run on a CPU |
| `vllm_limits`, `vllm_plan` | what cannot be simulated in vLLM, and what each of its layers computes |
| `vllm_worker` | rollouts by vLLM; never run |
| `command`, `hydra_values`, `parquet`, `reward` | the command of `roundoff verl-config`, data and rewards |

Doors: `command` and `parquet`, for `roundoff verl-config`; `entry` and `entry_point`, which verl imports; `reward`,
which verl's settings name. Only `settings`, `rows`, `aqn_switch`, `reports`, `command`, `hydra_values`, `parquet`,
`reward`, `vllm_limits` and `vllm_plan` can be imported without verl.
"""
