"""What is drawn is well-formed, and holds a point for every figure."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plot import draw, find_engine, main

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "2026-11-22-cpu-2core-60m.json"
SVG = "{http://www.w3.org/2000/svg}"


def luminance(colour: str) -> float:
    """Relative, as WCAG defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_kept_result_is_drawn(tmp_path: Path) -> None:
    main([str(RESULT), str(tmp_path / "plots" / "engine.svg")])
    root = ElementTree.parse(tmp_path / "plots" / "engine.svg").getroot()
    facts = find_engine(json.loads(RESULT.read_text()))
    assert facts is not None
    assert len(root.findall(f"{SVG}circle")) == len(facts["engine"])
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {"8", "16", "look-ahead 1", "look-ahead 4", "roofline"} <= set(texts)


def test_everything_lies_on_the_paper_and_is_readable_on_light_and_dark() -> None:
    facts = find_engine(json.loads(RESULT.read_text()))
    assert facts is not None
    root = ElementTree.fromstring(draw(facts))
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    for circle in root.findall(f"{SVG}circle"):
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
    colours = {element.attrib["fill"] for element in root.iter() if element.attrib.get("fill", "none") != "none"}
    for colour in colours:
        assert 1.05 / (luminance(colour) + 0.05) >= 3, f"{colour} on white"
        assert (luminance(colour) + 0.05) / (luminance("#0d1117") + 0.05) >= 3, f"{colour} on a dark page"


def test_one_number_of_slots_and_odd_names_are_drawn_too() -> None:
    facts = find_engine(json.loads(RESULT.read_text()))
    assert facts is not None
    one = dict(facts) | {"engine": facts["engine"][:1], "device": "a <b> & c"}
    assert ElementTree.fromstring(draw(one)).findtext(f"{SVG}title", "").startswith("Decoder 60m on a <b> & c")


def test_a_file_without_figures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"peers": {"engine": 3}}')
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other.json"), str(tmp_path / "out.svg")])
    assert "no figures" in capsys.readouterr().err
