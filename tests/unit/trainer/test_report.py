import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.handmade_run import make_prepared, make_spec, write_run

from trainer.expectations import PromptResult, judge
from trainer.report import build_report, duration, markdown, read_results, use_commands, write_report
from trainer.report_html import MAX_POINTS, esc, html_page, line_chart, running_mean, thin, ticks
from trainer.report_terminal import display_width, printable, terminal_table, wrap
from trainer.spec import PromptSpec, TrainError

EVIL = "<script>alert('x')</script> \"quoted\" & ``` | \x1b[31mred\x00"
VOID = {"meta", "col", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def result(user, base, tuned, contains=(), system=None):
    prompt = PromptSpec(user, system, tuple(contains), "", "")
    return PromptResult(
        prompt, "你是小薇。", base and judge(prompt, base, 5, True), judge(prompt, tuned, len(tuned), tuned != EVIL)
    )


RESULTS = [
    result("你是谁？", "我是一个人工智能助手。", "我是小薇 😀", ["小薇"]),
    result("Who are you?", "I am a bot.", "I am Nova.", ["Nova"]),
    result(EVIL, EVIL, EVIL, ["Nova"], system="<i>terse</i>"),
    result("What is 1+1?", "2", "2"),
]


@pytest.fixture
def spec(tmp_path):
    spec = make_spec(tmp_path)
    write_run(tmp_path, spec, make_prepared())
    return spec


@pytest.fixture
def report(spec, tmp_path):
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    models = {"base": "/cache/model", "tuned": spec.paths.merged_dir, "adapter": None, "template": "model"}
    return build_report(RESULTS, models | {"max_new_tokens": 12}, (plan, spec, make_prepared()))


@pytest.fixture
def folder(report, tmp_path):
    write_report(tmp_path / "report", report)
    return tmp_path / "report"


def test_the_last_row_of_a_repeated_step_counts(report):
    assert report["training"] == {
        "steps": 6,
        "attempts": 2,
        "skipped_steps": 0,
        "first_loss": 2.5,
        "last_loss": 1 / 6,
        "loss_spikes": [],
        "seconds": 60.0,
        "tokens": 6000,
        "supervised_tokens": 2400,
        "tokens_per_second": 100.0,
        "share_of_peak": None,
        "peak_memory_gb": 1.5,
    }
    assert [row["loss"] for row in report["curve"]] == [2.5, 2.0, 1.5, 1 / 4, 1 / 5, 1 / 6]


def test_skipped_steps_spikes_and_share_of_peak(spec):
    spike = {"time": 1.0, "event": "loss_spike", "step": 3, "loss": 4.5, "expected": 1.75}
    places = [f"/d.jsonl:{n}" for n in range(1, 8)]
    more = {"seconds": 30.0, "tokens": 10, "supervised_tokens": 5, "memory_gb": 1.0, "attempt": 2}
    with open(spec.paths.metrics, "a", encoding="utf-8") as f:
        row = {"step": 7, "loss": None, "skipped": True, "share_of_peak": 0.2, **more}
        f.write("\n" + json.dumps(row) + "\n")
        f.write(json.dumps({"step": 8, "loss": 0.125, "share_of_peak": 0.6, "memory_gb_max": 3.5, **more}) + "\n")
        # A profiled step is slower than the program is.
        f.write(json.dumps({"step": 9, "loss": 0.25, "share_of_peak": 0.0, "profiled": True, **more}) + "\n")
    events = [spike | {"step": n, "rows": places, "rows_left_out": 2} for n in range(3, 10)]
    Path(spec.paths.events).write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    models = {"base": None, "tuned": spec.paths.merged_dir, "adapter": None, "template": "model", "max_new_tokens": 1}
    report = build_report(RESULTS, models, ({}, spec, make_prepared()))
    assert report["training"]["skipped_steps"] == 1
    assert report["training"]["share_of_peak"] == 0.4
    assert report["training"]["peak_memory_gb"] == 3.5
    facts = [tuple(fact) for fact in report["facts"]]
    assert ("Steps", "9 in 2 attempts, 1 skipped (fp16 overflow)") in facts
    assert ("Loss", "2.5000 → 0.2500 (first → last step)") in facts
    assert any(
        name == "Speed" and value.endswith(", 40% of the matrix product rate measured here") for name, value in facts
    )
    shown = "step 3: 4.5000 where about 1.7500 was expected; /d.jsonl:1, /d.jsonl:2, /d.jsonl:3, /d.jsonl:4 and 5 more"
    assert ("Loss spike", shown) in facts
    assert ("Loss spikes", "2 more: see events.jsonl") in facts
    page = html_page(report)
    assert "step 3: 4.5000" in page
    assert "step 3: 4.5000" in markdown(report)


def report_of_held_out(spec, losses):
    """The report after these (step, loss) events, a spike among them."""
    events = [
        {"time": 1.0, "event": "loss_spike", "step": 2, "loss": 9.0, "expected": 1.0, "rows": [], "rows_left_out": 0}
    ]
    for step, loss in losses:
        row = {
            "time": 2.0,
            "event": "held_out_loss",
            "step": step,
            "loss": loss,
            "supervised_tokens": 1234,
            "seconds": 1.5,
        }
        events.append(row)
    Path(spec.paths.events).write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    models = {"base": None, "tuned": spec.paths.merged_dir, "adapter": None, "template": "model", "max_new_tokens": 1}
    return build_report(RESULTS, models, ({}, spec, make_prepared()))


def held_out_facts(report):
    return [value for name, value in report["facts"] if "eld-out" in name]


@pytest.mark.parametrize(
    ("losses", "known", "fact"),
    [
        (
            [(0, 2.5), (2, 1.25), (4, 1.5), (6, 1.75)],
            [(0, 2.5), (2, 1.25), (4, 1.5), (6, 1.75)],
            "2.5000 → 1.7500 (step 0 → 6); lowest 1.2500 at step 2, over 1,234 supervised tokens",
        ),
        (
            [(0, 2.5), (3, 1.75), (6, 1.25)],
            [(0, 2.5), (3, 1.75), (6, 1.25)],
            "2.5000 → 1.2500 (step 0 → 6), over 1,234 supervised tokens",
        ),
        (  # continued from step 3: step 4 again, then 6
            [(0, 2.5), (2, 1.75), (4, 1.0), (4, 1.5), (6, 1.25)],
            [(0, 2.5), (2, 1.75), (4, 1.5), (6, 1.25)],
            "2.5000 → 1.2500 (step 0 → 6), over 1,234 supervised tokens",
        ),
        (
            [(0, None), (2, 1.75), (4, None), (5, 2.0), (1200, None)],
            [(2, 1.75), (5, 2.0)],
            "1.7500 → 2.0000 (step 2 → 5); lowest 1.7500 at step 2, over 1,234 supervised tokens",
        ),
        (
            [(0, 2.5), (1200, 2.25)],
            [(0, 2.5), (1200, 2.25)],
            "2.5000 → 2.2500 (step 0 → 1,200), over 1,234 supervised tokens",
        ),
    ],
    ids=["lowest in between", "lowest at the end", "continued", "not finite", "two"],
)
def test_the_loss_of_held_out_rows_is_a_fact_and_a_curve(spec, losses, known, fact):
    report = report_of_held_out(spec, losses)
    assert held_out_facts(report) == [fact]
    assert fact in markdown(report)
    text = html_page(report)
    page = Page(text)
    assert fact in page.text
    charts = text.split("<svg")[1:]
    assert len(charts) == 3
    assert f'aria-label="loss of the held-out rows by step: {known[-1][1]:.4g} at the end"' in charts[1]
    (curve,) = re.findall(r'class="line" d="M([^"]*)"', charts[1])
    assert len(curve.split(" L")) == len(known)
    (alone,) = re.findall(r'class="line" d="M([^"]*)"', line_chart(known, 200, "loss of the held-out rows"))
    assert curve == alone
    assert [row["step"] for row in report["held_out"]] == sorted({step for step, _ in losses})


@pytest.mark.parametrize("losses", [[], [(0, None), (6, None)]])
def test_without_a_loss_of_held_out_rows_nothing_is_said_of_it(spec, losses):
    report = report_of_held_out(spec, losses)
    assert held_out_facts(report) == []
    text = html_page(report)
    assert "held-out rows" not in text
    assert text.count("<svg") == 2
    assert ("Loss", "2.5000 → 0.1667 (first → last step)") in [tuple(fact) for fact in report["facts"]]


def test_json_holds_everything_and_comes_back(folder, report):
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert report["evaluation"]["num_expectations"] == 3
    assert (report["evaluation"]["base_passed"], report["evaluation"]["tuned_passed"]) == (0, 2)
    assert set(report["versions"]) == {"python", "platform", "tunelaunch", "torch", "transformers", "peft", "deepspeed"}
    assert report["plan"]["spec"]["run_id"] == report["run_id"]
    assert read_results(folder) == RESULTS
    assert "小薇" in (folder / "report.json").read_text(encoding="utf-8")


def test_html_shows_the_numbers(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for text in (
        "identity <1> & 小薇",
        "identity-20250102-030405-abcd",
        "104 documents in 37 rows of at most 512 tokens: 18,234 tokens, 6,021 supervised",
        "2.5000 → 0.1667 (first → last step)",
        "16 = micro 2 x accumulate 4 x data-parallel 2",
        "100 tokens/s (6,000 tokens)",
        "6 in 2 attempts",
        "我是小薇 😀",
        "does not contain “Nova”",
        "launch recipes/identity.yaml --cpu 2",
        "launch chat identity-20250102-030405-abcd",
        "continued from a checkpoint",
        "base 0 → 2 of 3",
    ):
        assert text in page.text, text
    assert page.text.count("✓ met") == 2
    assert page.text.count("✗ not met") == 4
    assert page.tags.count("svg") == 2
    assert ("charset", "utf-8") in page.attributes
    assert ("lang", "zh") in page.attributes


def test_html_is_harmless_and_self_contained(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.text.count("<script>alert('x')</script>") == 3
    assert not {"img", "link", "iframe", "object", "base", "a"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload", "onerror", "onclick"}
    assert "url(" not in text
    assert "@import" not in text
    assert "\x1b" not in text
    assert "\x00" not in text
    assert any(value and "default-src 'none'" in value for _, value in page.attributes)


def test_esc_of_attributes_and_control_characters():
    assert esc("\"'<>&\x07\r\n") == "&quot;&#x27;&lt;&gt;&amp;\ufffd\n"


def test_markdown_keeps_answers_in_fences_longer_than_their_own(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Expectations met: base 0 of 3, **tuned 2 of 3**." in text
    assert "```\n我是小薇 😀\n```" in text
    assert f"````\n{EVIL}\n````" in text
    outside = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", text)
    assert "<script>" not in outside
    assert "<i>" not in outside


def test_merge_report_is_shown(spec, tmp_path):
    merge = {"verified": False, "tensors": 9, "tensors_merged": 4, "bytes": 5_000_000, "dtype": "bf16"}
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge_report.json").write_text(json.dumps(merge))
    models = {"base": None, "tuned": spec.paths.merged_dir, "adapter": None, "template": "model", "max_new_tokens": 1}
    report = build_report(RESULTS, models, ({"spec": {}}, spec, make_prepared()))
    html = write_report(tmp_path / "report", report).read_text(encoding="utf-8")
    assert "NO: do not use the merged model" in html
    assert "4 of 9 tensors merged, 5.0 MB, bf16" in html


def test_a_report_of_plain_folders_without_base_or_training(tmp_path):
    only_tuned = [result("Who?", None, "Me.")]
    models = {"base": None, "tuned": "/models/my model", "adapter": None, "template": "model", "max_new_tokens": 9}
    report = build_report(only_tuned, models)
    text = write_report(tmp_path / "new" / "report", report).read_text(encoding="utf-8")
    page = Page(text)
    assert "svg" not in page.tags
    assert "Base" not in page.text.split("Key facts")[0]
    assert "vllm serve '/models/my model' --served-model-name my-model" in page.text
    assert read_results(tmp_path / "new" / "report") == only_tuned


def test_losses_that_are_no_numbers_are_null_and_left_out_of_the_curve(spec, tmp_path):
    with open(spec.paths.metrics, "a", encoding="utf-8") as f:
        f.write('\n{"step": 7, "attempt": 2, "loss": NaN, "learning_rate": 1e-5, "tokens": 1, "supervised_tokens": 1, ')
        f.write('"seconds": 1.0, "memory_gb": 1}\n')
    models = {"base": None, "tuned": "/m", "adapter": None, "template": "model", "max_new_tokens": 1}
    report = build_report(RESULTS, models, ({"spec": {}}, spec, make_prepared()))
    write_report(tmp_path / "report", report)
    text = (tmp_path / "report" / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["training"]["last_loss"] == 1 / 6
    assert "nan" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8").split("<svg")[1]


def test_a_missing_report_is_a_user_error(tmp_path):
    with pytest.raises(TrainError, match=r"report\.json"):
        read_results(tmp_path)


def test_commands_for_an_adapter_and_for_another_template():
    models = {"tuned": "/base", "adapter": "/run/adapter", "template": "model"}
    assert [r["command"] for r in use_commands("x", models, "x-1")] == ["launch merge x-1"]
    models = {"tuned": "/run/merged", "adapter": None, "template": "/t/chatml.jinja"}
    commands = {r["name"]: r["command"] for r in use_commands("小薇", models, "")}
    assert commands["vLLM"] == "vllm serve /run/merged --served-model-name tuned --chat-template /t/chatml.jinja"
    assert commands["Chat in the terminal"] == "launch chat /run/merged"


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.26, "1.3 s"), (192, "3 min 12 s"), (59.99, "60.0 s"), (7505, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 3.2, [0, 1, 2, 3, 4]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (5, 5, [5]),
        (0.97, 1.02, [0.96, 0.98, 1, 1.02]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high, 4) == expected


def test_chart_places_points_and_survives_a_single_one():
    svg = line_chart([(1, 4.0), (2, 0.0)], 300, "loss")
    Page(svg)
    assert re.search(r'class="line" d="M64\.0,26\.0 L930\.0,260\.0"', svg)
    Page(line_chart([(7, 1.5)], 300, "loss"))


def test_thinning_keeps_the_spike_and_the_ends():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[5003] = (5003.0, 99.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS + 4
    assert (5003.0, 99.0) in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_running_mean_ends_on_the_last_value():
    points = [(float(i), float(i % 2)) for i in range(101)]
    smooth = running_mean(points)
    assert smooth[-1] == points[-1]
    assert smooth[50][1] == pytest.approx(0.5, abs=0.06)


def test_table_lines_up_with_wide_characters():
    table = terminal_table(RESULTS[:2], 80)
    lines = table.splitlines()
    assert max(map(display_width, lines)) <= 80
    second = lines[0].index("base")
    third = lines[0].index("tuned")
    (first_row,) = [line for line in lines if "你是谁" in line]
    assert display_width(first_row.split("✗")[0]) == second
    assert display_width(first_row.split("✓")[0]) == third
    assert lines[-1] == "expectations met: base 0 of 2, tuned 2 of 2"


def test_narrow_table_stacks_and_long_answers_are_cut():
    long = [result("Who?", "word " * 300, "我" * 300)]
    narrow = terminal_table(long, 40, max_lines=4)
    assert max(map(display_width, narrow.splitlines())) <= 40
    assert narrow.count("... (all in the report)") == 2
    assert terminal_table(long, 100, max_lines=5).count("... (all in the report)") == 2


def test_table_cannot_steer_the_terminal_and_needs_no_base():
    table = terminal_table([result(EVIL, None, EVIL)], 80)
    assert "\x1b" not in table
    assert "base" not in table.splitlines()[0]
    assert printable("a\tb\x1b[2J\r\nc") == "a   b\ufffd[2J\nc"


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 7, ["one two", "three"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("我是小薇，你好。", 8, ["我是小", "薇，你", "好。"]),
        ("我叫Nova呀", 6, ["我叫", "Nova呀"]),
        ("a\n\nb", 9, ["a", "", "b"]),
        ("e\u0301e\u0301e\u0301", 2, ["e\u0301e\u0301", "e\u0301"]),
        ("", 5, [""]),
    ],
)
def test_wrap_by_display_width(text, width, lines):
    assert wrap(text, width) == lines


def test_the_report_needs_no_torch():
    code = "import sys, trainer.report, trainer.report_terminal; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
