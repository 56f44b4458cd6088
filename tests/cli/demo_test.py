"""demo sends a text through the layer and reports what it found."""

import re
from html.parser import HTMLParser

from command_line import CommandLineTest

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.\n" * 40


class TagCounter(HTMLParser):
    def __init__(self):
        super().__init__()
        self.count = {}
        self.resources = []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.resources += [value for name, value in attrs if name in ("src", "href")]


class DemoTest(CommandLineTest):
    def run_demo(self, *more):
        self.write("text.txt", TEXT)
        output = self.succeed("demo", "--text", "text.txt", "--batch", 300, "--out", "report", *more)
        return output, self.read_json("report/report.json")

    def test_every_row_is_checked_and_counted(self):
        output, report = self.run_demo()
        checks = report["checks"]
        self.assertTrue(checks["ok"])
        self.assertEqual(checks["outputs_checked"], len(TEXT))
        expert_rows = sum(sum(rank["rows_per_expert"]) for rank in report["load"])
        self.assertEqual(expert_rows, 8 * len(TEXT))
        self.assertEqual(checks["rows_checked"], report["rows_sent"])
        self.assertEqual([len(rank["rows_per_expert"]) for rank in report["load"]], [32] * 4)
        self.assertLessEqual(checks["largest_error"], checks["tolerance"])
        self.assertRegex(output, r"rank 3 +96-127")
        self.assertIn("report/report.html", output)

    def test_routing_follows_the_text(self):
        _, report = self.run_demo()
        self.assertGreater(report["load_summary"]["busiest_expert_of_mean"], 1.5)

    def test_links_carry_the_rows_that_were_sent(self):
        _, report = self.run_demo()
        # Each row sent comes back as a partial sum of the same size.
        total = sum(sum(row) for row in report["link_bytes"])
        self.assertEqual(total, 2 * report["rows_sent"] * 64 * 4)
        self.assertLess(report["rows_sent"], 4.001 * len(TEXT))

    def test_the_page_is_complete_and_needs_nothing_else(self):
        self.run_demo()
        page = (self.folder / "report/report.html").read_text()
        tags = TagCounter()
        tags.feed(page)
        self.assertEqual(tags.resources, [])
        self.assertNotIn("url(", page)
        self.assertNotIn("@import", page)
        self.assertEqual(tags.count["svg"], 1)
        self.assertEqual(len(re.findall(r'title="expert \d+ on rank', page)), 128)
        self.assertEqual(tags.count["td"], 16 + 6 * 3)
        self.assertIn("prefers-color-scheme:dark", page)
        self.assertIn('name="viewport"', page)

    def test_other_presets_types_and_more_ranks_than_tokens(self):
        for more in ("--preset deepseek-v3 --dtype bf16", "--preset gpt-oss-20b --ranks 3", "--tokens 2 --ranks 3", "--ranks 1", "--preset glm-4.5 --tokens 700"):
            with self.subTest(more=more):
                _, report = self.run_demo(*more.split())
                self.assertTrue(report["checks"]["ok"])

    def test_the_same_seed_gives_the_same_load(self):
        _, first = self.run_demo("--tokens", 500)
        _, second = self.run_demo("--tokens", 500)
        _, other = self.run_demo("--tokens", 500, "--seed", 2)
        self.assertEqual(first["load"], second["load"])
        self.assertNotEqual(first["load"], other["load"])
