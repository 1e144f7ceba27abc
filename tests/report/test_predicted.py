"""The report of a prediction: the same figures in JSON, Markdown, page and terminal, and what is unknown said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import reports
from pages import Page
from reports import HOSTILE

from qkit.cli import main
from qkit.errors import QkitError
from qkit.estimate.command import summary
from qkit.estimate.fit import BATCHES
from qkit.report.folder import NAMES, out_folder
from qkit.report.predicted import drawings, tables
from qkit.report.predicted import wording as w
from qkit.report.predicted import write as report
from qkit.report.predicted.cards import cards
from qkit.report.predicted.choose import decode_rate, ordered, per_million, relevant, smallest, useful
from qkit.report.predicted.shown import market


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return reports.predictions(tmp_path_factory.mktemp("predictions"))


def words(body: str) -> str:
    return " ".join(body.replace("\\", "").split())


def test_the_answer_comes_first_everywhere(made):
    result = made["one"]
    each = result.estimates[0]
    a = each.answers[0]
    context, p = a.fit.largest_context(1), a.speeds.decode
    said = w.verdict(each)
    assert said.startswith("Llama-3.3-70B at 4 bits fits one NVIDIA H100 SXM5 80GB in vLLM, with up to ")
    for figure in (
        f"up to {context:,} tokens of context",
        f"about {p.tokens_per_s:.0f} tokens/s ({p.low:.0f} to {p.high:.0f})",
    ):
        assert figure in said
    page = Page(report.to_html(result)).text
    for body in (page, report.to_markdown(result), summary(result)):
        assert said in words(body)
        assert words(body).index(said) < 400
    assert "PREDICTED" in summary(result) and "PREDICTED" in report.to_markdown(result) and "predicted" in page


def test_cards_say_the_figures_of_the_object(made):
    a = made["one"].estimates[0].answers[0]
    memory, context, decode, first, cost = cards(made["one"].estimates[0])
    assert memory["value"] == "fits" and context["value"] == f"{a.fit.largest_context(1):,}"
    assert decode["value"] == f"{a.speeds.decode.tokens_per_s:.0f} tok/s" and first["title"] == "First token"
    assert cost["value"] == f"${a.costs.per_million_out:.2f}" and f"${a.costs.usd_per_hour:.2f}/h" in cost["note"]


def test_what_does_not_fit_says_what_would(made):
    each = made["four"].estimates[0]
    first, second, _, refused = (w.of_one(each, i) for i in range(4))
    fit = each.answers[0].fit
    assert f"more than the {fit.usable / 1e9:.1f} GB that vLLM can use" in first
    steps = [s for s in useful(each, 0) if s.fit.fits]
    assert f"As {steps[0].name} (" in first and f"up to {steps[0].largest_context:,} tokens" in first
    assert "two GeForce RTX 4090" in second and " on each, " in second
    assert "vLLM needs compute capability 7." in refused
    page = report.to_html(made["four"])
    assert "it does not fit" in page and "unknown" in page


@pytest.mark.parametrize("kind", ["one", "four", "all", "two"])
def test_the_document_is_what_the_object_says(made, kind):
    result = made[kind]
    written = json.loads((Path(result.out) / "profile.json").read_text())
    assert written == json.loads(json.dumps(result.as_dict())) and written["kind"] == "predicted"
    for each, told in zip(result.estimates, written["estimates"], strict=True):
        assert len(told["answers"]) == len(each.answers)
        for a, answer in zip(each.answers, told["answers"], strict=True):
            assert answer["memory"]["total"] == a.fit.memory.total == sum(answer["memory"]["parts"].values())
            assert answer["fits"] == a.fit.fits and (answer["speed"] is None) == (a.speeds is None)
            assert (answer["speed_unknown"] is None) == (a.speeds is not None)
            assert (answer["grid"] is None) == (kind == "all")
            if answer["grid"] and answer["grid"]["fits"]:
                for row, fits in zip(answer["grid"]["needs"], answer["grid"]["fits"], strict=True):
                    assert fits == [n <= a.fit.usable and not a.fit.problem for n in row] and row == sorted(row)


def test_the_map_says_what_the_fit_says(made):
    a = made["one"].estimates[0].answers[0]
    batches, rows = tables.room(a)
    assert batches == [str(n) for n in BATCHES]
    for name, cells in rows:
        context = int(name.replace(",", ""))
        for n, (shown, fits) in zip(BATCHES, cells, strict=True):
            assert fits == a.fit.fits_at(context, n) and float(shown.replace(",", "")) == pytest.approx(
                a.fit.needs(context, n) / 1e9, abs=0.5
            )
    page = report.to_html(made["one"])
    assert page.count('class="yes">✓ ') == sum(ok for _, cells in rows for _, ok in cells)
    assert page.count('class="no">✗ ') == sum(not ok for _, cells in rows for _, ok in cells)


def test_points_lie_under_the_roof_where_the_middle_of_a_prediction_does(made):
    """The work of a step, counted twice: by the roofline's points, and by hand for a dense model."""
    each = made["one"].estimates[0]
    roof, arch = each.answers[0].speeds.roof, each.subject.arch
    spots = {(s.phase, s.sequences, s.tokens): s for s in roof.spots}
    one = spots["decode", 1, 8192]
    attention = len(arch.layers) * 2 * 64 * (128 + 128) * 8192
    operations = 2 * (arch.active_parameters) + attention
    read = each.subject.weights.total - each.subject.weights.of_class("embedding") + 8192 * 327_680
    assert one.operations_per_byte == pytest.approx(operations / read, rel=0.01)
    assert one.operations_per_s == pytest.approx(operations * each.answers[0].speeds.decode.tokens_per_s, rel=0.01)
    for s in roof.spots:
        assert s.low < s.operations_per_s < s.high
        assert s.operations_per_s < 1.05 * min(roof.peak, roof.bandwidth * s.operations_per_byte)
    assert roof.bandwidth == pytest.approx(3350e9) and roof.peak == pytest.approx(989.4e12)


def test_all_devices_show_thirty_and_fold_the_rest(made):
    each = made["all"].estimates[0]
    shown, every = relevant(each), ordered(each)
    assert len(shown) == 30 and len({id(a) for a in shown}) == 30
    fitting = [a for a in every if a.fit.fits]
    priced = [a for a in fitting if a.costs]
    assert (
        max(fitting, key=decode_rate) in shown and min(priced, key=per_million) in shown and smallest(fitting) in shown
    )
    assert min((a for a in every if a.fit.fits is False and not a.fit.problem), key=lambda a: -a.fit.spare) in shown
    page = report.to_html(made["all"])
    folded = "".join(re.findall(r"<details>(.*?)</details>", page, re.DOTALL))
    for a in every:
        row = f'<th scope="row">{a.target.spec}</th>'
        assert (row in folded) == (a not in shown) and row in page
    body = report.to_markdown(made["all"])
    assert body.count("\n| ") < 60 and f"30 of {len(every)} devices" in body


def test_relevance_keeps_the_order_and_everything_where_there_is_room(made):
    each = made["four"].estimates[0]
    assert relevant(each) == ordered(each) and len(relevant(each)) == 4
    rates = [decode_rate(a) for a in ordered(made["all"].estimates[0]) if a.fit.fits]
    assert rates == sorted(rates, reverse=True)


def test_several_models_have_a_section_each(made):
    result = made["two"]
    page = Page(report.to_html(result))
    heads = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert (
        heads[0] == "h1" and heads.count("h1") == 1 and heads.count("h2") == 3
    )  # two models, and how to make it again
    for name in ("Llama-3.1-8B", "Mixtral-8x7B"):
        assert f"## {name}" in report.to_markdown(result) and name in summary(result)
    assert "nobody knows the memory there" in page.text


@pytest.mark.parametrize("kind", ["one", "four", "all", "two"])
def test_the_text_is_narrow_and_ends_with_the_report(made, kind):
    text = summary(made[kind])
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[-1] == f"report: {Path(made[kind].out) / 'profile.html'}"
    for steps in re.findall(r"  the next steps down\n((?:    .*\n?)+)", text):
        assert 1 <= len(steps.strip().splitlines()) <= 7
    assert "(" not in re.sub(r"\([^()]*\)", "", text), "parentheses within parentheses: a price's whole source"


def test_sources_of_prices_stand_in_json_and_html(made):
    a = made["one"].estimates[0].answers[0]
    source = a.costs.source
    assert source in report.to_html(made["one"]).replace("&#39;", "'") and source in json.dumps(
        made["one"].as_dict(), ensure_ascii=False
    )
    assert source not in words(summary(made["one"])) and market(source) in words(summary(made["one"]))


def test_steps_are_few_and_each_is_of_use(made):
    for each in (made["four"].estimates[0], made["two"].estimates[0], made["two"].estimates[1]):
        for index, found in enumerate(each.steps):
            kept, now = useful(each, index), each.subject.weights.total
            found = [s for s in found if s.kv_dtype or s.nbytes < 0.95 * now]
            assert len(kept) <= 7 and len({(s.nbytes, s.kv_dtype) for s in kept}) == len(kept)
            assert [s.nbytes for s in kept] == sorted((s.nbytes for s in kept), reverse=True)
            fitting = [s for s in found if s.fit.fits]
            assert bool([s for s in kept if s.fit.fits]) == bool(fitting)
            if fitting:
                assert max(fitting, key=lambda s: s.nbytes).nbytes == max(s.nbytes for s in kept if s.fit.fits)


def test_a_missed_threshold_is_seen_everywhere(tmp_path):
    result = reports.predicted(tmp_path, ["Llama-3.1-8B"], ["rtx-4090"], min_tps=1e6)
    assert not result.passed and result.as_dict()["passed"] is False
    for body in (report.to_html(result), report.to_markdown(result), summary(result)):
        assert "hreshold missed" in body and "below 1e+06" in body
    unknown = reports.predicted(tmp_path, ["Llama-3.3-70B"], ["rtx-4090"], min_tps=1.0)
    assert not unknown.passed and "the speed is unknown (it does not fit), --min-tps is 1" in report.to_html(unknown)
    many = reports.predicted(tmp_path, ["Llama-3.1-8B"], ["all"], min_tps=1e6)
    assert len(many.failures) == len(many.estimates[0].answers) and f"and {len(many.failures) - 4} more" in summary(
        many
    )
    met = reports.predicted(tmp_path, ["Llama-3.1-8B"], ["rtx-4090"], min_tps=1.0)
    assert met.passed and "Thresholds met: min-tps 1" in report.to_html(met)


def test_a_page_is_self_contained_and_escaped(tmp_path):
    name = HOSTILE.replace("/", "∕").replace("\n", " ")
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"name": name, "memory_gib": 24, "bandwidth_gbs": 900, "fp16_tflops": 100}))
    folder = reports.config(tmp_path, "Llama-3.1-8B", name)
    assert main(["profile", folder, "--device", str(card), "-o", str(tmp_path / "r")]) == 0
    page = (tmp_path / "r" / "profile.html").read_text()
    parsed = Page(page)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a"} & {
        tag for tag, _ in parsed.tags
    }
    for _, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action", "xlink:href"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "default-src 'none'" in page
    assert name in parsed.text
    body = (tmp_path / "r" / "profile.md").read_text()
    assert "<script" not in re.sub(r"(`{3,}).*?\1", "", body, flags=re.DOTALL).replace("\\<", "")
    widths: set[int] = set()
    for line in [*body.split("\n"), ""]:
        if line.startswith("|"):
            widths.add(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(widths) <= 1
            widths = set()


def test_the_command_line_writes_the_report_where_it_says(tmp_path, monkeypatch, capsys):
    folder = reports.config(tmp_path, "Llama-3.1-8B")
    monkeypatch.chdir(tmp_path)
    assert main(["profile", f"{folder}/config.json", "--device", "rtx-4090"]) == 0
    place = Path("qkit-profile") / "Llama-3.1-8B"
    assert f"report: {place / 'profile.html'}" in capsys.readouterr().out
    assert sorted(p.name for p in place.iterdir()) == sorted(NAMES)
    assert main(["profile", folder, "--device", "rtx-4090", "-o", "here", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("here/profile.json").read_text())
    assert main(["profile", folder, "--device", "rtx-4090", "--scheme", "w5a16", "-o", "not"]) == 2
    assert not Path("not").exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QkitError, match="cannot be made"):
        out_folder(str(tmp_path / "file" / "r"), ["m"])


def test_every_part_of_the_memory_has_a_colour(made):
    style = (Path(report.__file__).parents[1] / "page.css").read_text()
    drawn = {
        t.name
        for result in made.values()
        for e in result.estimates
        for a in e.answers
        for t in a.fit.memory.terms
        if t.nbytes
    }
    assert drawn <= drawings.PARTS.keys()
    for css in drawings.PARTS.values():
        assert f".fill-{css}" in style
