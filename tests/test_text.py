"""Text from people's files is read as they meant it; text to their terminals is shown, and does nothing there."""

import ast
import codecs
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import davir_ray
from davir_ray.cli import exit_status
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.sources import Source
from davir_ray.config.yaml import dump
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.conversation import Conversation
from davir_ray.errors import ConfigError, DataError
from davir_ray.inputs import last_config
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.places import read_template
from davir_ray.run.files import digest
from davir_ray.run.folder import Run
from davir_ray.run.manifest import CONFIG_HEAD
from davir_ray.stages.prepare import Preparation, scoring_spec
from davir_ray.text import decoded, printable

PACKAGE = Path(davir_ray.__file__).parent.parent

HOSTILE = (
    "\x1b]0;title\x07 \x1b[31mred\x1b[0m a\rb \x9b2J \u202eright to left \u2066 x\u2028y \ufeff é ⟦日本⟧ 👩\u200d🚀"
)
"""A window's title, colours, a line overwritten, a screen cleared, a line turned around; and text that is only text."""


@given(st.text().filter(lambda text: "\r" not in text and not text.startswith("\ufeff")))
def test_a_text_is_the_same_whatever_editor_saved_it(text: str) -> None:
    lines = text.replace("\n", "\r\n")
    for content in (text.encode(), lines.encode("utf-8-sig"), lines.encode("utf-16"), lines.encode()):
        assert decoded(content) == text
    assert decoded(codecs.BOM_UTF16_BE + lines.encode("utf-16-be")) == text


def test_another_encoding_is_an_error() -> None:
    with pytest.raises(UnicodeDecodeError):
        decoded("é".encode("latin-1"))


@given(st.text(st.characters(codec=None)))
def test_nothing_that_acts_on_a_terminal_is_left(text: str) -> None:
    shown = printable(text)
    assert not set(shown) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029)}
    assert not set(shown) & set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()
    assert printable(shown) == shown


def test_what_is_only_text_stays() -> None:
    text = "é ⟦日本⟧\n\t「東京」\u3000\u00a0 ar: مرحبا he: שלום 👩\u200d🚀 می\u200cخواهم\n"
    assert printable(text) == text
    assert printable("a\r\n\x1b[2J\u202e\x9b") == "a\\r\n\\x1b[2J\\u202e\\x9b"


JOB = f"""
import logging, sys
from davir_ray.cli import exit_status
from davir_ray.errors import DataError
HOSTILE = {HOSTILE!a}

def job():
    print("shown: " + HOSTILE)
    logging.getLogger("davir_ray.x").warning("told: %s", HOSTILE)
    raise DataError("failed: " + HOSTILE)

sys.exit(exit_status(job))
"""
TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "UTF-8": {"PYTHONIOENCODING": "utf-8"},
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_job_speaks_on_every_terminal_and_data_act_on_none(terminal: str) -> None:
    environment = {**TERMINALS[terminal], "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, env=environment, check=False)
    encoding = {"latin-1": "latin-1", "UTF-8": "utf-8"}.get(terminal, "ascii")
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 2, err
    assert "Traceback" not in err and "Logging error" not in err
    lines = [*out.splitlines(), *err.splitlines()]
    assert [line.partition(":")[0] for line in lines] == ["shown", "told", "-c"]
    for line in lines:
        assert line.isascii() or line.replace("\u200d", "").isprintable()
        assert "\\x1b]0;title\\x07 \\x1b[31mred" in line and "right to left" in line
        assert ("⟦日本⟧" in line) == (terminal == "UTF-8") and ("é" in line) == (terminal in ("UTF-8", "latin-1"))


def test_a_traceback_in_the_log_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        try:
            raise ValueError("\x1b[31m")
        except ValueError:
            logging.getLogger("davir_ray").exception("told")
        raise DataError("ended")

    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    root.handlers.clear()
    try:
        assert exit_status(job) == 2
    finally:
        root.handlers[:] = before
    err = capsys.readouterr().err
    assert err.startswith("told\nTraceback (most recent call last):\n") and "ValueError: \\x1b[31m\n" in err


SAVED = {
    "plain": lambda text: text.encode(),
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "UTF-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
}
PARSE = """
import sys
from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import dump
sys.stdout.write(ascii(dump(parse_as(RunConfig, sys.argv[1:]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "UTF-8"])
def test_a_configuration_is_the_same_whatever_editor_and_locale(tmp_path: Path, locale: str) -> None:
    text = "# é\nlimit: 3\nbase: m/é\nselect:\n  top_k: 2\noutput: |-\n  a\n  b\n"
    found = set()
    for name, save in SAVED.items():
        (tmp_path / f"{name}.yaml").write_bytes(save(text))
        command = [sys.executable, "-c", PARSE, "--config", str(tmp_path / f"{name}.yaml")]
        environment = {**TERMINALS[locale], "PYTHONPATH": str(PACKAGE)}
        found.add(subprocess.run(command, capture_output=True, env=environment, check=True).stdout)
    values = yaml.safe_load(ast.literal_eval(found.pop().decode()))
    assert not found
    for name, value in yaml.safe_load(text).items():
        assert values[name] == value or values[name]["top_k"] == value["top_k"] == 2


TEMPLATE = """{{ bos_token }}{% for m in messages %}
{{ m['role'] }}: {{ m['content'] }}{{ '\\n' if m['role'] == 'user' else eos_token }}
{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}
é"""
TALK = [{"role": "user", "content": "a\r\nb"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize("name", SAVED)
def test_a_chat_template_renders_alike_whatever_editor_saved_it(
    name: str, tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """In a file of its own and in a tokenizer's folder; a message keeps its own line ends."""
    expected = tokenizer.apply_chat_template(TALK, chat_template=TEMPLATE, tokenize=False)
    file = tmp_path / "template.jinja"
    file.write_bytes(SAVED[name](TEMPLATE))
    assert read_template(str(file)) == TEMPLATE
    given = Preparation(
        base=Checkpoint.find(str(base_folder)), config=PrepareConfig(), chat_template=read_template(str(file))
    )
    specs = [scoring_spec(given, [CHAT])]
    assert expected.startswith(rendered(given))
    assert "a\r\nb" in rendered(given)
    if name != "UTF-16":  # transformers reads it
        shutil.copytree(base_folder, tmp_path / "base")
        shutil.copy(file, tmp_path / "base" / "chat_template.jinja")
        own = Preparation(base=Checkpoint.find(str(tmp_path / "base")), config=PrepareConfig())
        assert rendered(own) == rendered(given)
        specs.append(scoring_spec(own, [CHAT]))
    assert {spec["chat_template"] for spec in specs} == {digest(TEMPLATE)}


CHAT = Source(name="s", path="s", format="messages")


def rendered(preparation: Preparation) -> str:
    chat = ChatTemplate.from_tokenizer(preparation.base.tokenizer(), preparation.chat_template)
    return "".join(segment.text for segment in chat.segments(Conversation(messages=TALK, column="messages")))


def test_a_template_that_is_no_text_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"t\.jinja cannot be used: it is not UTF-8 text .*; save it as UTF-8"):
        read_template(str(tmp_path / "t.jinja"))


def test_a_runs_own_configuration_may_be_saved_by_an_editor(tmp_path: Path) -> None:
    run, config = Run.at(tmp_path), RunConfig(base="m/é", limit=3)
    run.remember(dump(config))
    for save in SAVED.values():
        (tmp_path / "config.yaml").write_bytes(save(CONFIG_HEAD + dump(config)))
        assert run.check_claim({"config.yaml"})
        assert last_config(run) == config
