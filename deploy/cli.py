"""The command `kikitori`: parse, call, print. Results go to stdout, everything else to stderr."""

import io
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config import RunConfig, load_config, require_output_uri
from pipeline.errors import ConfigError, KikitoriError

if TYPE_CHECKING:
    from actors.job import JobResult
    from pipeline.messages import Failure, Source, Transcript
    from pipeline.status import Status, VersionParts
    from pipeline.storage import Storage

_EXIT_ERRORS, _EXIT_USAGE, _EXIT_SYSTEM = 1, 2, 3
_ONE_LINE = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}  # a file name may hold them
_PEERS = Path(__file__).parent.parent / "benchmarks" / "peers.py"
_Command = TypeVar("_Command", bound=Callable[..., object])

# Heavy imports (torch 1.5 s, ray 0.5 s, measured) stay inside the verbs that need them: `--help` answers at once.


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminated)
    _speak_utf8()
    try:
        code = cli.main(standalone_mode=False, prog_name="kikitori")
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show(sys.stderr)
        code = _EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        code = 128 + signal.SIGINT
    except ConfigError as error:
        _complain(str(error))
        code = _EXIT_USAGE
    except KikitoriError as error:
        _complain(str(error))
        code = _EXIT_SYSTEM
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing to add
        code = _EXIT_ERRORS
    except OSError as error:  # a disk or a store; its message says what to do
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        _complain(str(error))
        code = _EXIT_SYSTEM
    except Exception as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        _complain(f"{type(error).__name__}: {error} (not an error we expected: -v shows where; please report it)")
        code = _EXIT_SYSTEM
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kikitori")
def cli() -> None:
    """Transcribe a bucket of any audio with Kyutai STT: complete, timestamped, audited Parquet."""


def _common(command: _Command) -> _Command:
    """The options that every verb has."""
    options = (
        click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there."),
        click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set any config value."),
        click.option("-v", "--verbose", is_flag=True, help="Say more on stderr, and where an error came from."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE_OR_GLOB...")
@click.option("--model", metavar="M", default=None, help="Hub id, local folder, fsspec URI, or `demo`.")
@click.option("--format", "form", type=click.Choice(["text", "json", "srt", "vtt"]), help="Default: text.")
@click.option("--device", type=str, default=None, metavar="cpu|cuda", help="Where the model runs.")
@_common
def transcribe(
    files: Sequence[str],
    model: str | None,
    form: str | None,
    device: str | None,
    as_json: bool,
    overrides: Sequence[str],
    verbose: bool,
) -> int:
    """Transcribe files in this process, without Ray; transcripts to stdout.

    `text` prints the text alone for one input and PATH<TAB>TEXT lines for several; `json` one output row per line.
    """
    _configure_logging(verbose)
    if as_json and form not in (None, "json"):
        raise ConfigError(f"--json and --format {form} were both given; choose one")
    chosen = {"checkpoint.source": model, "checkpoint.device": device}
    # Not ASCII: YAML takes the two escapes of a character beyond the first 65,536 for two characters.
    named = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items() if value is not None]
    config = load_config(None, [*named, *overrides])
    return _transcribe(config, files, "json" if as_json else form or "text")


@cli.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@click.option("--new-version", is_flag=True, help="Settings differ from the output's: do every input again with these.")
@click.option("--retry-errors", "codes", metavar="CODE,...", help="Also redo inputs with these error codes, or `all`.")
@click.option(
    "--max-error-rate", metavar="R", type=click.FloatRange(0, 1), help="Stop when more than this share are errors."
)
@_common
def run(
    config_path: str,
    new_version: bool,
    codes: str | None,
    max_error_rate: float | None,
    as_json: bool,
    overrides: Sequence[str],
    verbose: bool,
) -> int:
    """Transcribe all inputs of a config on Ray; repeat it to do what remains."""
    _configure_logging(verbose)
    config = load_config(config_path, overrides)
    from actors.job import RunOptions, retry_codes, run_job

    if max_error_rate is not None and math.isnan(max_error_rate):
        raise ConfigError("--max-error-rate is not a number; expected 0 to 1")
    options = RunOptions(
        new_version=new_version,
        retry_codes=frozenset() if codes is None else retry_codes(codes),
        max_error_rate=max_error_rate,
    )
    with redirect_stdout(sys.stderr):  # Ray prints there when a worker dies
        result = run_job(config, Console(stderr=True), options)
    _print_json(_result_as_json(result)) if as_json else _print_result(result)
    return result.exit_code


@cli.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@click.option("--show-config", is_flag=True, help="Print the complete resolved config, and do nothing else.")
@_common
def plan(config_path: str, show_config: bool, as_json: bool, overrides: Sequence[str], verbose: bool) -> int:
    """List the inputs, write the manifest, show shards, hours and what remains."""
    _configure_logging(verbose)
    config = load_config(config_path, overrides)
    if show_config:
        text = config.to_yaml()
        _print_json(_yaml_as_json(text)) if as_json else click.echo(text, nl=False)
        return 0
    from pipeline.plan import make_plan
    from pipeline.status import status_of
    from pipeline.storage import Storage
    from pipeline.write import check_columns

    check_columns(config.output.columns)
    output_uri = require_output_uri(config)
    output = Storage(config.output.storage_options)
    with _working("listing inputs and reading headers"):
        made = make_plan(config, Storage(config.input.storage_options), output)
        status = status_of(made, output_uri, output)
    facts = _status_as_json(status, output_uri) | {"ignored": dict(made.ignored)}
    facts["estimated_audio_hours"] = round(made.estimated_seconds / 3600, 4)
    _print_json(facts) if as_json else _print_status("plan", status, output_uri, made.estimated_seconds, made.ignored)
    return 0


@cli.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@_common
def status(config_path: str, as_json: bool, overrides: Sequence[str], verbose: bool) -> int:
    """How far a run is, from storage alone."""
    _configure_logging(verbose)
    config = load_config(config_path, overrides)
    from pipeline.plan import read_plan
    from pipeline.status import status_of
    from pipeline.storage import Storage

    output_uri, output = require_output_uri(config), Storage(config.output.storage_options)
    with _working("reading the plan and the parts' footers"):
        made = read_plan(output_uri, output)
        found = status_of(made, output_uri, output)
    if as_json:
        _print_json(_status_as_json(found, output_uri))
    else:
        _print_status("status", found, output_uri, made.estimated_seconds, {})
    return 0


@cli.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@_common
def fetch(config_path: str, as_json: bool, overrides: Sequence[str], verbose: bool) -> int:
    """Download the checkpoint and check every file and tensor of it."""
    _configure_logging(verbose)
    config = load_config(config_path, overrides)
    from pipeline.fetch import describe, open_fetched
    from pipeline.fetch import fetch as fetch_checkpoint

    with _working("fetching and checking the checkpoint"):
        fetched = fetch_checkpoint(config.checkpoint)
        checkpoint = open_fetched(fetched)
    facts = {
        "model_id": fetched.model_id,
        "model_revision": fetched.revision,
        "folder": str(fetched.folder),
        **describe(checkpoint),
    }
    _print_json(facts) if as_json else _print_facts("checkpoint", facts)
    return 0


@cli.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@click.option("--slots", "slots", default="8,16,32", show_default=True, metavar="N,N", help="Streams per pass.")
@click.option("--lookahead", "lookaheads", default="1,4", show_default=True, metavar="K,K", help="Positions per pass.")
@click.option("--mix", metavar="2.5s|librispeech|30s|1h", help="Synthetic clips; without it, the config's inputs.")
@click.option("--clips", "num_clips", type=click.IntRange(1), help="How many.  [default: 3 per slot]")
@click.option("--seconds", type=click.FloatRange(0.1), help="Cut synthetic clips to this length.")
@click.option("--shape", metavar="2.6b|1b|60m|tiny", help="Random weights of this shape; mix librispeech by default.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--peers", is_flag=True, help="Also measure transformers and moshi (from a source checkout).")
@_common
def bench(
    config_path: str,
    slots: str,
    lookaheads: str,
    mix: str | None,
    num_clips: int | None,
    seconds: float | None,
    shape: str | None,
    repeats: int,
    peers: bool,
    as_json: bool,
    overrides: Sequence[str],
    verbose: bool,
) -> int:
    """Measure RTFx of engine and pipeline; a table for people, the last line one JSON object."""
    _configure_logging(verbose)
    config = load_config(config_path, overrides)
    num_slots = _numbers("--slots", slots)
    from pipeline.bench import BenchOptions
    from pipeline.bench import bench as measure

    options = BenchOptions(
        num_slots=num_slots,
        lookaheads=_numbers("--lookahead", lookaheads),
        mix="librispeech" if shape and not mix else mix,
        num_clips=num_clips or 3 * max(num_slots),
        longest_seconds=seconds,
        shape=shape,
        repeats=repeats,
    )
    if peers:
        _require_peers(shape)
    with Console(stderr=True).status("measuring") as shown:
        report = measure(config, options, on_step=shown.update)
    facts = report.as_json()
    if not as_json:
        _print_bench(facts)
    if peers:
        facts["peers"] = _run_peers(shape or "60m", repeats, quiet=as_json)
    _print_json(facts)
    return 0


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`8,16` -> (8, 16)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} is {text!r}; expected whole numbers from 1, separated by commas, such as 8,16,32")
    return tuple(int(part) for part in parts)


def _print_bench(facts: Mapping[str, Any]) -> None:
    work, machine, pipeline = facts["workload"], facts["machine"], facts["pipeline"]
    title = (
        f"{facts['model']}, {facts['parameters'] / 1e6:,.1f} M parameters, {facts['dtype']} on {facts['device']} "
        f"({facts['threads']} threads; {machine['gigabytes_per_second']:,.1f} GB/s, "
        f"{machine['gigaflops_per_second']:,.0f} GFLOP/s measured)\n"
        f"{work['name']}: {work['clips']} clips, {work['credited_seconds']:,.1f} s of speech, "
        f"{work['step_seconds']:,.1f} s of frames"
    )
    click.echo(title)
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("slots", "K", "RTFx", "step RTFx", "spread", "tokens", "ms", "limit ms", "of limit", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in facts["engine"]:
        numbers = (row["slots"], row["lookahead"], f"{row['rtfx']:,.1f}", f"{row['step_rtfx']:,.1f}")
        spent = (f"{row['spread']:.0%}", f"{row['tokens_per_pass']:.2f}", f"{row['pass_ms']:.2f}")
        limit = (f"{row['limit_ms']:.2f}", f"{row['of_limit']:.0%}", row["bound"])
        table.add_row(*map(str, (*numbers, *spent, *limit)))
    Console(soft_wrap=False).print(table)
    click.echo(
        "K: look-ahead; tokens: of a stream, and ms: both per pass; limit: what this machine allows for that pass"
    )
    shares = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in pipeline["stage_seconds"].items())
    click.echo(
        f"pipeline, {pipeline['slots']} slots, look-ahead {pipeline['lookahead']}: RTFx {pipeline['rtfx']:,.1f} "
        f"(step {pipeline['step_rtfx']:,.1f}); the engine alone on the same codes {pipeline['bare_engine_rtfx']:,.1f}. "
        f"Time in stages: {shares}"
    )


def _require_peers(shape: str | None) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "moshi") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--peers needs {' and '.join(missing)}, not installed here; `make test` installs both")
    if not _PEERS.is_file():
        raise ConfigError("--peers needs the source checkout: the scripts in benchmarks/ are not part of the package")
    if shape not in (None, "60m", "1b", "tiny"):
        raise ConfigError(f"--peers compares the shapes 60m, 1b and tiny, not {shape}")


def _run_peers(shape: str, repeats: int, *, quiet: bool) -> Any:
    """Run `benchmarks/peers.py`, showing what it prints; -> its JSON object."""
    import subprocess

    command = [sys.executable, "-m", "benchmarks.peers", "--shape", shape, "--repeats", str(repeats)]
    done = subprocess.run(command, cwd=_PEERS.parent.parent, stdout=subprocess.PIPE, text=True, check=False)
    *shown, last = done.stdout.splitlines() or [""]
    if done.returncode:
        raise KikitoriError(f"benchmarks/peers.py ended with status {done.returncode}; what it said is above")
    if not quiet:
        click.echo("\n".join(shown))
    return json.loads(last)


def _transcribe(config: RunConfig, files: Sequence[str], form: str) -> int:
    import torch

    from pipeline.fetch import fetch as fetch_checkpoint
    from pipeline.messages import Failure
    from pipeline.run import build_stages, in_order
    from pipeline.run import transcribe as transcribe_all
    from pipeline.storage import Storage
    from pipeline.write import check_columns

    check_columns(config.output.columns)
    sources = _sources(files, Storage(config.input.storage_options))
    if form in ("srt", "vtt") and len(sources) > 1:
        raise ConfigError(f"--format {form} is one file of captions, but {len(sources)} inputs were given; name one")
    stages = build_stages(config, fetch_checkpoint(config.checkpoint))
    names = {} if len(sources) == 1 else {source.uri: name for source, name in sources.items()}
    torch.set_num_threads(stages.num_threads())
    show = _printer(form, stages.provenance(run_id="transcribe"), config, names=names)
    failures = 0
    with _counting(len(sources)) as tick:
        for result in in_order(sources, transcribe_all(sources, stages)):
            if isinstance(result, Failure):
                failures += 1
                if form != "json":
                    _complain(f"{result.source.uri}: {result.code}: {result.message}")
            show(result)
            tick()
    return _EXIT_ERRORS if failures else 0


def _sources(files: Sequence[str], storage: "Storage") -> "dict[Source, str]":
    """The inputs in the order in which they were named, each with its name as it was given, or else its URI."""

    from pipeline.discover import discover
    from pipeline.storage import normalise

    if "" in files:
        raise ConfigError("an input is the empty string; name a file, a folder or a glob")
    sources: dict[Source, str] = {}
    for file in files:
        for found in discover([file], storage).found:
            sources.setdefault(found.source, file if normalise(file) == found.source.uri else found.source.uri)
    return sources


def _printer(
    form: str, provenance: Any, config: RunConfig, *, names: Mapping[str, str]
) -> "Callable[[Transcript | Failure], None]":
    """How one result is printed; `names` says by URI what its line begins with, and is empty for a single input."""
    from datetime import UTC, datetime

    from pipeline.captions import srt, vtt
    from pipeline.messages import Failure
    from pipeline.write import row_to_json, to_row

    def show(result: "Transcript | Failure") -> None:
        if form == "json":
            row = to_row(result, provenance, columns=config.output.columns, transcribed_at=datetime.now(UTC))
            click.echo(row_to_json(row))
        elif isinstance(result, Failure):
            return
        elif form == "text":
            name = names.get(result.source.uri)
            click.echo(result.text if name is None else f"{name.translate(_ONE_LINE)}\t{result.text}")
        else:
            click.echo((srt if form == "srt" else vtt)(result.words), nl=False)

    return show


def _status_as_json(status: "Status", output_uri: str) -> dict[str, Any]:
    return {
        "output_uri": output_uri,
        "complete": status.is_complete,
        "inputs": status.num_inputs,
        "rows": status.num_rows if status.is_counted else None,
        "ok": status.num_ok if status.is_counted else None,
        "errors": dict(status.errors) if status.is_counted else None,
        "shards": status.num_shards,
        "committed_shards": status.num_committed_shards,
        "remaining_shards": status.num_shards - status.num_committed_shards,
        "outdated_shards": status.num_outdated_shards,
        "audio_hours": round(status.audio_seconds / 3600, 4) if status.is_counted else None,
        "remaining_audio_hours_estimated": round(status.remaining_seconds / 3600, 4),
        "versions": [
            {"number": one.number, "config_fingerprint": one.config_fingerprint, "parts": one.num_parts}
            for one in status.versions
        ],
    }


def _result_as_json(result: "JobResult") -> dict[str, Any]:
    return _status_as_json(result.status, result.output_uri) | {
        "run_id": result.run_id,
        "shards_done": result.num_shards_done,
        "audio_hours_done": round(result.audio_seconds / 3600, 4),
        "wall_seconds": round(result.wall_seconds, 2),
        "rtfx": round(result.rtfx, 2),
        "lanes_lost": result.num_lost_lanes,
        "exit_code": result.exit_code,
    }


def _print_result(result: "JobResult") -> None:
    from pipeline.metrics import format_hours

    title = "stopped" if result.signal else "done"
    _print_status(title, result.status, result.output_uri, None, result.ignored)
    pace = f"{format_hours(result.audio_seconds)} of audio in {result.wall_seconds:.1f} s, RTFx {result.rtfx:.1f}"
    lost = f", {result.num_lost_lanes} lanes lost and replaced" if result.num_lost_lanes else ""
    click.echo(f"this run: {result.num_shards_done} shards, {pace}{lost}")


def _print_status(title: str, status: "Status", output_uri: str, estimated_seconds: float | None, ignored: Any) -> None:
    from pipeline.metrics import format_hours

    facts: dict[str, Any] = {
        "output": output_uri,
        "inputs": f"{status.num_inputs:,}",
        "shards": f"{status.num_committed_shards:,} of {status.num_shards:,} committed",
    }
    if status.is_counted:
        facts["transcribed"] = f"{status.num_ok:,} inputs, {format_hours(status.audio_seconds)} of audio"
        facts["errors"] = ", ".join(f"{code} {count:,}" for code, count in status.errors.items()) or "none"
    if len(status.versions) > 1:
        facts["versions"] = "; ".join(_version_line(one, status) for one in status.versions)
    if not status.is_complete:
        facts["remaining"] = f"about {format_hours(status.remaining_seconds)} of audio"
    if estimated_seconds is not None:
        facts["planned"] = f"about {format_hours(estimated_seconds)} of audio, from headers and file sizes"
    if ignored:
        facts["left out"] = ", ".join(f"{count:,} {kind}" for kind, count in ignored.items()) + " (not audio)"
    _print_facts(title, facts)


def _version_line(version: "VersionParts", status: "Status") -> str:
    place = ", in force" if version is status.versions[-1] else ""
    return f"{version.config_fingerprint} ({version.num_parts:,} parts{place})"


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(str(value)))  # as a plain string, `[x]` would be markup
    Console(soft_wrap=False).print(table)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def _yaml_as_json(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _complain(message: str) -> None:
    click.echo(f"kikitori: {message}", err=True)


def _speak_utf8() -> None:
    """JSON is UTF-8 whatever the terminal is; and a file name need not be either."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _configure_logging(verbose: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    for package in ("pipeline", "actors", "deploy"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, and would say all twice


def _terminated(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


@contextmanager
def _working(what: str) -> Generator[None]:
    """Show that something is going on, on a terminal."""
    with Console(stderr=True).status(what):
        yield


@contextmanager
def _counting(total: int) -> Generator[Callable[[], None]]:
    """A bar on stderr while inputs are transcribed; only on a terminal, and only for several inputs."""
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal or total < 2:
        yield lambda: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("transcribing", total=total)
        yield lambda: bar.advance(task)
