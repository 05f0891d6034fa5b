"""The token: found in Ray's own order, and shown by nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.job import ClusterError
from cluster.ray_token import read_token


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n", encoding="utf-8")
    (tmp_path / "other").write_text("  of-path \n", encoding="utf-8")
    return tmp_path


def test_the_order_is_rays(home: Path) -> None:
    env = {"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(home / "other"), "RAY_AUTH_TOKEN": "of-variable"}
    found = []
    for drop in ("", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        env.pop(drop, None)
        token = read_token(env)
        assert token is not None
        found.append(token.value)
    assert found == ["of-variable", "of-path", "of-home"]


def test_an_empty_variable_is_none_and_no_place_at_all_is_no_error(home: Path, tmp_path: Path) -> None:
    token = read_token({"HOME": str(home), "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""})
    assert token is not None
    assert token.value == "of-home"
    assert read_token({"HOME": str(tmp_path / "nobody")}) is None


@pytest.mark.parametrize("text", ["", "   ", "two words", "line\r\nX-Injected: 1", "键"])
def test_what_is_no_token_is_refused_without_being_shown(home: Path, text: str) -> None:
    (home / "other").write_text(text, encoding="utf-8")
    with pytest.raises(ClusterError) as caught:
        read_token({"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(home / "other")})
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_file_that_is_named_and_missing_is_an_error_and_no_later_place_is_taken(home: Path) -> None:
    with pytest.raises(ClusterError, match="cannot be read"):
        read_token({"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(home / "gone")})


def test_its_value_is_in_no_representation(home: Path) -> None:
    token = read_token({"HOME": str(home)})
    assert "of-home" not in repr(token)
    assert "of-home" not in str(token)
