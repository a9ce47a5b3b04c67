"""Credentials stand in the files of cluster/ by reference only."""

import re
from pathlib import Path
from typing import Any

import pytest
from deployment import TEXTS, YAMLS, documents, walk

LOOKS_SECRET = [
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bhf_[A-Za-z0-9]{16,}",
    r"-----BEGIN",
    r"\w+://[^/\s]*:[^/\s]*@",
    r"(?i)(?:secret_access_key|password|passwd|auth_token)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{8,}",
    r"(?<![A-Za-z0-9/+_.-])(?=[A-Za-z0-9/+]*[A-Z])(?=[A-Za-z0-9/+]*\d)[A-Za-z0-9+]{32,}(?![A-Za-z0-9/+_.-])",
]
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


def inlined(document: Any, text: str) -> list[str]:
    """Places where a secret stands, and where one would."""
    found = [match[0] for pattern in LOOKS_SECRET for match in re.finditer(pattern, text)]
    for where, value in walk(document):
        if isinstance(value, dict) and SECRET_NAME.search(str(value.get("name", ""))) and "value" in value:
            found.append(where)
        if isinstance(value, str):
            found += [
                where for name, given in re.findall(r"\b([A-Z_]+)=(\S+)", value) if SECRET_NAME.search(name) and given
            ]
        if isinstance(value, dict) and value.get("kind") == "Secret":
            found.append(where)
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    assert inlined(documents(path) if path in YAMLS else None, path.read_text()) == []


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"env": [{"name": "HF_TOKEN", "value": "x"}]}, ""),
        ({"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": ""}]}, ""),
        ({"run_options": ["--env AWS_SECRET_ACCESS_KEY=x"]}, ""),
        ({"kind": "Secret", "stringData": {"a": "b"}}, ""),
        (None, "aws_access_key_id: AKIAIOSFODNN7EXAMPLE"),
        (None, "password: hunter2hunter2"),
        (None, "s3://key:secret@bucket/run"),
        (None, "token: 9f2bA0c4d5e6f708192a3b4c5d6e7f8091a2b3c4"),
        (None, "hf_abcdefghijklmnopqrstuv"),
    ],
)
def test_a_secret_in_a_file_is_found(document: Any, text: str) -> None:
    assert inlined(document, text)


def test_every_secret_that_a_pod_takes_comes_by_reference() -> None:
    taken = [
        value["valueFrom"]["secretKeyRef"]["name"]
        for path in YAMLS
        for document in documents(path)
        for _, value in walk(document)
        if isinstance(value, dict) and SECRET_NAME.search(str(value.get("name", ""))) and "valueFrom" in value
    ]
    assert set(taken) == {"davir-ray-s3", "davir-ray-hugging-face"}
