import pickle
import re
from pathlib import Path

import pytest

from pipeline.errors import ERROR_CODES, CheckpointError, ConfigError, InputError, KikitoriError, SystemFailure

PROMISED = {
    "DECODE_FAILED", "UNSUPPORTED_FORMAT", "TRUNCATED", "EMPTY_AUDIO", "TOO_LONG", "NOT_FOUND", "FETCH_FAILED",
    "MODEL_ERROR", "WORKER_CRASHED",
}  # fmt: skip
ROOT = Path(__file__).parent.parent.parent


def test_the_promised_codes_are_known_and_explained() -> None:
    assert set(ERROR_CODES) >= PROMISED
    assert all(ERROR_CODES.values())


def test_no_code_is_used_that_is_not_known() -> None:
    used = {
        code
        for package in ("pipeline", "actors")
        for path in (ROOT / package).glob("*.py")
        for code in re.findall(r'(?:InputError\(|code=|_failure\([^"\n]*)\s*"([A-Z_]{4,})"', path.read_text())
    }
    assert used
    assert used <= set(ERROR_CODES)


def test_an_unknown_code_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="unknown error code OOPS; known: NOT_FOUND, "):
        InputError("OOPS", "x")


@pytest.mark.parametrize("error", [ConfigError("what"), CheckpointError("what"), SystemFailure("what")])
def test_an_error_crosses_processes(error: KikitoriError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), "what")


@pytest.mark.parametrize("code", sorted(ERROR_CODES))
def test_an_input_error_crosses_processes_with_its_code(code: str) -> None:
    """Exceptions are pickled by their `args`; those of this one are not what its constructor takes."""
    again = pickle.loads(pickle.dumps(InputError(code, "what")))
    assert (again.code, again.message, str(again)) == (code, "what", "what")


def test_only_what_the_user_can_correct_is_a_config_error() -> None:
    assert issubclass(CheckpointError, ConfigError)
    assert not issubclass(InputError, ConfigError)
    assert not issubclass(SystemFailure, ConfigError)
