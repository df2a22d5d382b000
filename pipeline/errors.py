"""The exception tree, and the codes an error row can carry.

KikitoriError
├── ConfigError          the user is wrong: raised before any work starts; exit code 2
│   └── CheckpointError  a checkpoint that cannot be found, or is not one we can load
├── InputError           one input is bad: the stage turns it into a `Failure`, which becomes an error row
└── SystemFailure        we or the machines are wrong: the run stops, what is committed stays; exit code 3
    ├── ModelFailure     encoder or decoder raised; the driver finds out over which input
    └── Superseded       another run has put newer settings in force in the same output
"""


class KikitoriError(Exception):
    """Root of every error this project raises on purpose. The message is written for the user."""


class ConfigError(KikitoriError):
    """A configuration, command line or checkpoint the user has to correct."""


class CheckpointError(ConfigError):
    """The checkpoint named by the user cannot be found or loaded."""


class SystemFailure(KikitoriError):
    """The run cannot go on: storage, the cluster or every lane failed."""


class ModelFailure(SystemFailure):
    """Encoder or decoder raised while several inputs were in hand: which one is to blame is not known yet."""


class Superseded(SystemFailure):
    """Another run has put newer settings in force in the same output; this one has nothing more to do there."""


class InputError(KikitoriError):
    """One input cannot be transcribed.

    Args:
        code: one of `ERROR_CODES`.
        message: what was found and what was expected; it becomes `error_message` of the row.
    """

    def __init__(self, code: str, message: str) -> None:
        if code not in ERROR_CODES:
            raise ValueError(f"unknown error code {code}; known: {', '.join(ERROR_CODES)}")
        super().__init__(code, message)  # both, because an exception is unpickled from these
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


ERROR_CODES: dict[str, str] = {
    "NOT_FOUND": "the input does not exist (any more)",
    "FETCH_FAILED": "the bytes could not be read from storage",
    "BAD_CONTAINER": "a tar, a Parquet file or a line of a manifest that does not lead to audio",
    "EMPTY_AUDIO": "no audio, or less than one frame of it",
    "UNSUPPORTED_FORMAT": "not audio, or a container or codec no decoder knows",
    "DECODE_FAILED": "recognised as audio, but its content is damaged",
    "TRUNCATED": "the container promises more audio than the file holds",
    "TOO_LONG": "longer than input.max_audio_hours",
    "DECODE_TIMEOUT": "its decoder gave nothing for so long that it was stopped",
    "MODEL_ERROR": "the model failed on this input",
    "WORKER_CRASHED": "the process working on this input died, repeatedly",
}
