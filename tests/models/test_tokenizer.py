"""Tokenizers judged by ids: what they add, what they lose, and tokens that the model has no embedding for."""

import json
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from roundoff.config import ConfigError
from roundoff.evaluation import evaluate
from roundoff.models.calibration import calibration_batches
from roundoff.models.errors import ModelError
from roundoff.models.load import TINY_DIRECTORY, LoadedModel, load_model
from roundoff.models.prompts import Worked, check_asked, encode
from roundoff.models.tokenizer import check_kept
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample
from roundoff.tasks import TASKS, Message, Problem
from roundoff.training.checks import check_prompts
from tests.small_models import make, make_tokenizer

EOS = [("<eos>", 1)]
ASKED = [Problem(text, text, "3", (Message("user", text),)) for text in ("1+2=", "12+34-5=")]


@pytest.fixture
def directory(tmp_path):
    """A copy of the embedded model."""
    target = tmp_path / "model"
    shutil.copytree(TINY_DIRECTORY, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return target


def rebuild(directory, change):
    """Change tokenizer.json through the library that reads it."""
    path = str(directory / "tokenizer.json")
    backend = Tokenizer.from_file(path)
    change(backend)
    backend.save(path)


def settings(directory, name="tokenizer_config.json", **changes):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def processor(single, *special):
    def change(backend):
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*special])

    return change


def ids(text):
    return load_model("tiny").tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(loaded, prompts):
    settings = {"group_size": 1, "max_new_tokens": 6, "temperature": 0.0, "key": Key(0)}
    return sample(loaded.model, loaded.tokenizer, prompts, **settings)


class TestAddedTokens:
    def test_an_appended_end_token_is_removed_everywhere(self, directory):
        rebuild(directory, processor("$A <eos>", *EOS))
        loaded, plain = load_model(str(directory)), load_model("tiny")
        assert loaded.tokenizer("1+2=")["input_ids"][-1] == 1  # the tokenizer itself does append it
        assert encode(loaded.tokenizer, ["1+2=", ASKED[1]]) == [ids("1+2="), ids("12+34-5=")]
        assert encode(loaded.tokenizer, [Worked(ASKED[0], "3")]) == [ids("1+2=3")]
        (batch,) = calibration_batches(loaded.tokenizer, [Worked(ASKED[0], "3")], batches=1)
        assert batch["input_ids"].tolist() == [ids("1+2=3")]
        assert greedy(loaded, ASKED).texts == greedy(plain, ASKED).texts
        task = TASKS["arithmetic"]({"train_problems": 8, "test_problems": 16})
        scores = [evaluate(m.model, m.tokenizer, task, key=Key(0), max_new_tokens=12).outcomes for m in (loaded, plain)]
        assert scores[0] == scores[1]

    def test_tokens_before_the_text_stay(self, directory):
        rebuild(directory, processor("> - $A <eos>", *EOS, (">", 15), ("-", 13)))
        assert encode(load_model(str(directory)).tokenizer, ["1+2="]) == [[15, 13, *ids("1+2=")]]

    @pytest.mark.parametrize("single", ["$A >", "> $A >", "$A <eos> >"])
    def test_any_other_appended_token_is_refused(self, directory, single):
        rebuild(directory, processor(single, *EOS, (">", 15)))
        with pytest.raises(ModelError, match=r"appends '>' \(id 15\) to every text.*post_processor in tokenizer\.json"):
            load_model(str(directory))

    def test_another_appended_token_is_refused_in_sampling_too(self):
        tokenizer = make_tokenizer()
        processor("$A >", (">", 15))(tokenizer.backend_tokenizer)
        with pytest.raises(ModelError, match=r"appends '>'"):
            sample(make(), tokenizer, ["1+2="], group_size=1, max_new_tokens=2, temperature=0, key=Key(0))

    def test_two_bos_tokens_are_refused(self, directory):
        settings(directory, bos_token=">")
        rebuild(directory, processor("> > $A", (">", 15)))
        with pytest.raises(ModelError, match=r"puts '>' \(id 15\) twice before every text"):
            load_model(str(directory))
        rebuild(directory, processor("> $A", (">", 15)))
        loaded = load_model(str(directory))
        check_asked(loaded, ["1+2="])
        for refused in (lambda: check_asked(loaded, [">1+2="]), lambda: greedy(loaded, [">1+2="])):
            with pytest.raises(ModelError, match=r"begins with '>' \(id 15\) twice"):
                refused()  # the task's text writes it, too
        loaded.tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}"
        with pytest.raises(ModelError, match=r"begins with '>' \(id 15\) twice"):
            check_prompts(loaded, ASKED)

    @pytest.mark.parametrize(("said", "does"), [(True, "$A"), (False, "> $A")])
    def test_add_bos_token_must_be_what_the_post_processor_does(self, directory, said, does):
        settings(directory, bos_token=">", add_bos_token=said)
        rebuild(directory, processor(does, (">", 15)))
        with pytest.raises(ModelError, match=f"says add_bos_token = {str(said).lower()}, but post_processor"):
            load_model(str(directory))
        settings(directory, chat_template="{{ messages[0].content }}")
        with pytest.warns(UserWarning, match="make them agree"):
            load_model(str(directory))
        settings(directory, add_bos_token=not said)
        load_model(str(directory), chat=False)

    def test_truncation_and_padding_of_tokenizer_json_do_nothing(self, directory):
        def change(backend):
            backend.enable_truncation(3)
            backend.enable_padding(length=12)

        rebuild(directory, change)
        loaded = load_model(str(directory))
        assert encode(loaded.tokenizer, ["12+34-5=", Worked(ASKED[0], "12345")]) == [ids("12+34-5="), ids("1+2=12345")]


class TestEmbeddings:
    def test_a_padding_token_without_one_is_refused(self, directory):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(directory)
        with pytest.raises(
            ModelError, match=r"padding token '\[PAD\]' \(id 16\) has no embedding \(the model has 16\)"
        ):
            load_model(str(directory))

    def test_an_end_token_without_one_is_refused(self, directory):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_special_tokens({"eos_token": "[END]"})
        tokenizer.save_pretrained(directory)
        with pytest.raises(ModelError, match=r"end token '\[END\]' \(id 16\) has no embedding"):
            load_model(str(directory))

    @pytest.mark.parametrize("ends", [16, [1, 99], -1, [1, "<eos>"]])
    def test_end_tokens_of_generation_config_without_one_are_refused(self, directory, ends):
        settings(directory, "generation_config.json", eos_token_id=ends)
        with pytest.raises(ModelError, match=r"eos_token_id of generation_config\.json|could not be loaded"):
            load_model(str(directory))

    def test_only_tokens_that_occur_in_a_prompt_need_one(self, directory):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_special_tokens({"additional_special_tokens": ["=+=", "=-="]})
        tokenizer.chat_template = "{% for m in messages %}=+={{ m.content }}{% endfor %}=-="
        tokenizer.save_pretrained(directory)
        loaded = load_model(str(directory))
        with pytest.raises(ModelError, match=r"'=\+=' \(id 16\), for which the model has no embedding"):
            check_prompts(loaded, ASKED)
        with pytest.raises(ModelError, match="has no embedding"):
            greedy(loaded, ASKED)
        with pytest.raises(ModelError, match="has no embedding"):
            greedy(loaded, [[3, 99]])
        check_prompts(load_model(str(directory), chat=False), ASKED)
        assert greedy(load_model(str(directory), chat=False), ASKED).texts == greedy(load_model("tiny"), ASKED).texts


class TestEnds:
    @pytest.mark.parametrize("end", ["{{ eos_token }}", "=<eos>"])
    def test_a_template_that_closes_the_turn_is_refused(self, directory, end):
        settings(directory, chat_template="{% for m in messages %}{{ m.content }}" + end + "{% endfor %}")
        loaded = load_model(str(directory))
        for refused in (lambda: check_prompts(loaded, ASKED), lambda: greedy(loaded, ASKED)):
            with pytest.raises(
                ModelError, match=r"chat template writes it, ends with the end token '<eos>'.*chat = fal"
            ):
                refused()
        check_prompts(load_model(str(directory), chat=False), ASKED)

    def test_a_blank_after_the_end_token_does_not_help(self):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["\n"])
        tokenizer.chat_template = "{{ messages[0].content }}<eos>\n"
        with pytest.raises(ModelError, match="ends with the end token"):
            encode(tokenizer, ASKED)
        tokenizer.chat_template = "{{ messages[0].content }}<eos>\n>"  # the header of an answer
        assert encode(tokenizer, ASKED[:1])[0][-3:] == [1, 16, 15]

    def test_an_end_token_of_generation_config_closes_the_turn_too(self, directory):
        settings(directory, "generation_config.json", eos_token_id=[1, 14])  # "="
        loaded = load_model(str(directory))
        with pytest.raises(ModelError, match=r"ends with the end token '=' \(id 14\)"):
            check_prompts(loaded, ASKED)
        with pytest.raises(ModelError, match=r"prompt 0 ends with the end token '=' \(id 14\)"):
            greedy(loaded, ["1+2="])

    def test_a_task_that_writes_an_end_token_is_refused(self):
        loaded = load_model("tiny")
        with pytest.raises(ModelError, match=r"prompt of a ends with.*change the task's prompt"):
            check_prompts(loaded, [Problem("a", "1+2=<eos>", "3")])
        with pytest.raises(ModelError, match="prompt 0 ends with"):
            greedy(loaded, ["1+2=<eos>"])


class TestLoss:
    def test_an_unknown_word_of_known_characters_is_refused(self):
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|."), "isolated")
        tokenizer.unk_token = "<pad>"
        loaded = LoadedModel(make(), tokenizer, "small", "here")
        check_asked(loaded, ["1+2="])
        with pytest.raises(ModelError, match=r"no token for a part of '12\+3='"):
            check_asked(loaded, ["12+3="])

    def test_a_normalizer_that_removes_characters_is_refused(self):
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"(?<=\d)\+"), "")
        loaded = LoadedModel(make(), tokenizer, "small", "here")
        check_asked(loaded, ["1-2="])
        with pytest.raises(ModelError, match=r"loses a part of '1\+2=': its tokens read '12='"):
            check_asked(loaded, ["1+2="])

    def test_other_forms_of_a_character_are_not_loss(self):
        class Accents:
            unk_token_id = None

            def decode(self, ids, **_):
                return "e a fi"

        check_kept(Accents(), "É Ａ ﬁ", [])  # capitals, accents, full width, ligature


def test_what_a_tokenizer_puts_before_every_text_is_not_in_a_response():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("-")  # as sentencepiece puts a blank there
    mark, digit = tokenizer.convert_tokens_to_ids(["-", "3"])
    prompt = encode(tokenizer, ["1+2="])[0]
    assert prompt[0] == mark
    assert tokenizer("3")["input_ids"] == [mark, digit]
    assert encode(tokenizer, [Worked(ASKED[0], "3")]) == [[*prompt, digit]]


def test_a_padding_token_that_occurs_in_texts_changes_nothing(directory):
    settings(directory, pad_token="1")
    loaded, plain = load_model(str(directory)), load_model("tiny")
    assert loaded.tokenizer.pad_token_id == 3
    found, expected = greedy(loaded, ASKED), greedy(plain, ASKED)
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert [row[m].tolist() for row, m in zip(found.tokens, found.attention_mask, strict=True)] == [
        row[m].tolist() for row, m in zip(expected.tokens, expected.attention_mask, strict=True)
    ]


def test_errors_are_of_roundoff(directory):
    settings(directory, eos_token=None)
    (directory / "generation_config.json").unlink()
    settings(directory, "config.json", eos_token_id=None)
    with pytest.raises(ConfigError, match="must have an end token"):
        greedy(load_model(str(directory)), ["1+2="])
