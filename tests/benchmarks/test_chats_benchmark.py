"""The benchmark of chats compares equal work, and what it says is complete; how long things take decides nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from davir_ray.benchmarks import chats
from davir_ray.benchmarks.chats import ChatsBenchmark, run
from davir_ray.errors import ConfigError, DataError

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


def test_both_encode_the_same_text(tmp_path: Path) -> None:
    file = str(tmp_path / "own.jinja")
    Path(file).write_text(TEMPLATE + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    found = run(ChatsBenchmark(chats=12, templates=["qwen2_5", file], vocab_size=400, repeats=1))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert found["templates"].keys() == {"qwen2_5", file}
    for name, result in found["templates"].items():
        tokens, seconds = result["tokens_of_first_batch"], result["seconds"]
        # A line break after the last turn is not scored, so it is no part of an example.
        assert tokens["tokenizer"] - tokens["davir_ray"] == (12 if name == "qwen2_5" else 0)
        assert result["ratio"] == pytest.approx(seconds["davir_ray"] / seconds["tokenizer"])
        assert result["ratio_of_template_alone"] == pytest.approx(seconds["template"] / seconds["tokenizer"])
        assert tokens["davir_ray"] < result["characters"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_the_chats_are_as_promised_and_the_same_each_time() -> None:
    made = list(chats._generate(50))
    assert made == list(chats._generate(50))
    assert {messages[0]["role"] for messages in made} == {"system", "user"}
    for messages in made:
        turns = [message for message in messages if message["role"] != "system"]
        assert [message["role"] for message in turns] in (["user", "assistant"] * 2, ["user", "assistant"] * 3)
        for message in turns:
            least, most = {"user": (10, 60), "assistant": (100, 300)}[message["role"]]
            assert least <= len(message["content"].split()) <= most


@pytest.mark.slow
def test_a_base_is_measured_with_its_own_template(base_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    (result,) = run(ChatsBenchmark(chats=3, base=str(base), repeats=1))["templates"].values()
    written = [
        f"[{message['role']}]{message['content']}</s>" for messages in chats._generate(3) for message in messages
    ]
    assert result["characters"] == sum(map(len, written))


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text(TEMPLATE + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    with pytest.raises(DataError, match=r"refused: .*no system"):
        run(ChatsBenchmark(chats=12, templates=[str(refusing)], vocab_size=400, repeats=1))
    with pytest.raises(ConfigError, match=r"neither a file nor in .*chat_templates"):
        run(ChatsBenchmark(chats=1, templates=["no_such"]))
    with pytest.raises(ConfigError, match="both base and templates"):
        ChatsBenchmark(base="b", templates=["qwen3"])
    with pytest.raises(ConfigError, match="chats is 0"):
        ChatsBenchmark(chats=0)
