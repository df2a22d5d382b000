"""`make demo`: the distributed job on the bundled speech, then what was said next to what was heard."""

import json
import sys
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import jiwer
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.job import RunOptions, run_job
from pipeline.config import load_config
from pipeline.errors import ConfigError, KikitoriError
from pipeline.metrics import format_hours

_ROOT = Path(__file__).parent.parent
_CONFIG = _ROOT / "configs" / "demo.yaml"
_SPEECH = _ROOT / "tests" / "data" / "speech"

# WER on lower case without punctuation: what the demo model can write at all.
_NORMALISE = jiwer.Compose(
    [
        jiwer.ToLowerCase(),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
        jiwer.ReduceToListOfListOfWords(),
    ]
)
_TITLES = {
    "synthetic-digits": "Digits, synthetic voices (unseen: held out from training): what the demo checkpoint is for",
    "people-digits": "Digits, recordings of people: beyond what it was trained on",
    "people": "Other speech of people: far beyond it. Everything works here except the model's hearing",
}


def main() -> int:
    """Run the job and show its result; -> exit code."""
    console = Console()
    overrides = [f'input.uris=["{_SPEECH / "digits"}", "{_SPEECH / "people"}"]']
    try:
        config = load_config(str(_CONFIG), overrides)
        # A new version, should there be an output that an earlier kikitori made with other weights or settings.
        result = run_job(config, Console(stderr=True), RunOptions(new_version=True))
    except KikitoriError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    show(config.output.uri, console)
    console.print(
        f"{format_hours(result.status.audio_seconds)} of audio, {result.status.num_rows} rows, "
        f"{result.status.num_errors} errors; this run took {result.wall_seconds:.0f} s, Ray's start included."
    )
    console.print(f"Transcripts with word times: [bold]{config.output.uri}/data/*.parquet[/]")
    console.print("Try your own: [bold].venv/bin/kikitori transcribe FILE --model demo[/] (digits), or a real model:")
    console.print("  [bold].venv/bin/kikitori transcribe FILE --model kyutai/stt-1b-en_fr[/]")
    return result.exit_code


def show(output_uri: str, console: Console) -> None:
    """Print said and heard side by side, with WER per kind of speech."""
    rows = pq.read_table(f"{output_uri}/data").to_pylist()
    # Of a clip that was touched since an earlier demo there are two rows: the latest counts.
    rows = sorted(rows, key=itemgetter("transcribed_at"))
    ours = [row for row in rows if Path(row["source_uri"]).is_relative_to(_SPEECH)]
    heard = {Path(row["source_uri"]).relative_to(_SPEECH).as_posix(): row for row in ours}
    references = [json.loads(line) for line in (_SPEECH / "references.jsonl").read_text().splitlines()]
    kinds: defaultdict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for reference in references:
        row = heard[reference["file"]]
        text = row["text"] if row["status"] == "ok" else f"[{row['error_code']}]"
        kinds[reference["kind"]].append((Path(reference["file"]).name, reference["text"], text))
    for kind in _TITLES:
        lines = kinds[kind]
        wer = jiwer.process_words(
            [said for _, said, _ in lines],
            [text for _, _, text in lines],
            reference_transform=_NORMALISE,
            hypothesis_transform=_NORMALISE,
        ).wer
        table = Table(title=f"{_TITLES[kind]}. WER {wer:.1%}", title_justify="left", title_style="bold")
        for column in ("clip", "said", "heard"):
            table.add_column(column, overflow="fold")
        for name, said, text in lines:
            table.add_row(name, said, _marked(said, text))
        console.print(table)


def _marked(said: str, heard: str) -> Text:
    """What was heard, green where it is what was said."""
    is_right = _NORMALISE(said) == _NORMALISE(heard)
    return Text(heard or "(nothing)", style="green" if is_right else "yellow")


if __name__ == "__main__":
    sys.exit(main())
