"""Small files of problems in the forms in which they are distributed."""

import json
from pathlib import Path

TRAIN = [
    (
        "Ann has 3 boxes of 24 pens. She sells 12 pens. How many are left?",
        "3*24=<<3*24=72>>72\n72-12=<<72-12=60>>60\n#### 60",
    ),
    ("A mill grinds 540 kg an hour. How much does it grind in 2 hours?", "540*2=<<540*2=1080>>1080\n#### 1,080"),
    ("Tom owes $5 and has nothing. What is his balance in dollars?", "He has 0 and owes 5.\n#### -5"),
    ("A rope of 3 m is cut into 4. How long is a piece, in m?", "3/4=<<3/4=0.75>>0.75\n#### 0.75"),
    ("Mia reads 7 pages a day. How many in a week?", "7*7=<<7*7=49>>49\n#### 49"),
]
TEST = [
    ("A bus has 40 seats and 13 are free. How many people sit?", "40-13=<<40-13=27>>27\n#### 27"),
    ("A farm sells 1000 eggs at $2 and 10 at $5. What does it earn?", "2000+50=<<2000+50=2050>>2050\n#### 2,050"),
    ("Half of the 18 students leave. How many stay?", "18/2=<<18/2=9>>9\n#### 9"),
]


def raw_rows(problems: list[tuple[str, str]]) -> list[dict]:
    return [{"question": question, "answer": answer} for question, answer in problems]


def verl_rows(problems: list[tuple[str, str]], split: str) -> list[dict]:
    """Files in the form that verl's `examples/data_preprocess/gsm8k.py` writes."""
    instruction = 'Let\'s think step by step and output the final answer after "####".'
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{question} {instruction}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer.rpartition("####")[2].strip().replace(",", "")},
            "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
        }
        for index, (question, answer) in enumerate(problems)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def raw_files(directory: Path) -> dict[str, object]:
    """Settings of a task on raw JSON lines."""
    train = write_jsonl(directory / "train.jsonl", raw_rows(TRAIN))
    return {"train": train, "test": write_jsonl(directory / "test.jsonl", raw_rows(TEST))}
