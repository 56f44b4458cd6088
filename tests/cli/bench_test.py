"""bench measures, checks, writes JSON that can be compared and drawn."""

import json
import xml.etree.ElementTree as ElementTree

from command_line import CommandLineTest

SMALL = {"--ranks": 2, "--tokens": 32, "--hidden-size": 64, "--experts": 8, "--top-k": 2, "--iterations": 5, "--warmup": 1}
FIGURES = ["dispatch", "combine", "combine_copy", "dispatch_and_combine"]


def small_but(*more):
    """SMALL as arguments, less those that `more` gives, and `more`: an option may be given once."""
    given = {*more, *(("--experts", "--top-k") if "--preset" in more else ())}
    kept = [word for option, value in SMALL.items() if option not in given for word in (option, value)]
    return [*kept, *more]


class BenchTest(CommandLineTest):
    def measure(self, name, *more):
        text = self.succeed("bench", *small_but(*more), "--json", name)
        return text, self.read_json(name)

    def test_a_run_tells_everything(self):
        text, report = self.measure("run.json", "--no-baseline")
        self.assertIn("dispatch + combine", text)
        self.assertIn("results checked", text)
        self.assertIn("no MPI baseline: --no-baseline was given", text)
        self.assertEqual(report["format"], "tokenyard-bench-1")
        self.assertEqual(report["transport"], "shm")
        self.assertEqual(report["settings"]["hidden_size"], 64)
        for key in ("cpu", "cores", "memory_bytes"):
            self.assertIn(key, report["machine"])
        for key in ("git_revision", "compiler", "build_type"):
            self.assertIn(key, report["versions"])
        self.assertEqual(sorted(report["figures"]), sorted(FIGURES))
        for figure in report["figures"].values():
            self.assertLessEqual(figure["min_us"], figure["median_us"])
            self.assertLessEqual(figure["median_us"], figure["max_us"])
            self.assertGreater(figure["min_us"], 0)
            self.assertAlmostEqual(figure["ratio_to_limit"], figure["limit_us"] / figure["median_us"])
            self.assertNotIn("baseline_us", figure)
        for samples in report["samples_us"].values():
            self.assertEqual(len(samples), 5)

    def test_bytes_are_those_of_the_rows(self):
        _, report = self.measure("one.json", "--no-baseline", "--experts", 2, "--top-k", 2)
        # Both experts, one per rank: every token's row goes to both ranks.
        self.assertEqual(report["figures"]["dispatch"]["bytes_all_ranks"], 2 * 2 * 32 * 128)
        self.assertEqual(report["figures"]["dispatch"]["bytes_to_other_ranks"], 2 * 32 * 128)
        self.assertEqual(report["figures"]["dispatch_and_combine"]["bytes_all_ranks"], 2 * 2 * 2 * 32 * 128)

    def test_the_sum_is_the_sum_per_iteration(self):
        _, report = self.measure("sum.json", "--no-baseline")
        samples = report["samples_us"]
        sums = sorted(d + c for d, c in zip(samples["dispatch"], samples["combine"]))
        self.assertAlmostEqual(report["figures"]["dispatch_and_combine"]["median_us"], sums[2])

    def test_every_way_to_run_is_checked_and_measured(self):
        for more in (
            "--transport inproc",
            "--mode latency --layout rank_slots --tokens 16",
            "--mode latency --layout expert_padded --tokens 4",
            "--layout expert_major --placement tp:2",
            "--layout expert_padded --sizing capacity --tokens 8",
            "--dtype fp8 --hidden-size 256",
            "--dtype float32 --skew 1.2 --threads 2 --placement replicated:2",
            "--preset gpt-oss-20b --hidden-size 64",
        ):
            with self.subTest(more=more):
                _, report = self.measure("way.json", "--no-baseline", *more.split())
                self.assertGreater(report["figures"]["dispatch_and_combine"]["median_us"], 0)

    def test_the_baseline_runs_in_the_same_processes_or_says_why_not(self):
        backends = json.loads(self.succeed("topo", "--ranks", 1, "--json"))["backends"]
        built = next((b["availability"] for b in backends if b["name"] == "mpi"), "not_built") != "not_built"
        text, report = self.measure("baseline.json")
        if built:
            self.assertEqual(report["ranks_as"], "processes started by mpirun")
            self.assertTrue(report["baseline"]["measured"], report["baseline"])
            for figure in report["figures"].values():
                self.assertAlmostEqual(figure["ratio_to_baseline"], figure["baseline_us"] / figure["median_us"])
                self.assertAlmostEqual(figure["ratio_to_plain"], figure["plain_us"] / figure["median_us"])
            self.assertIn("vs tuned", text)
            self.assertIn("vs plain", text)
            self.succeed("bench", "chart", "baseline.json", "--svg", "chart.svg")
            self.assertIn("times faster", self.svg_text("chart.svg"))
        else:
            self.assertFalse(report["baseline"]["measured"])
            self.assertIn("TY_MPI", report["baseline"]["why_not"])
            self.assertIn("no MPI baseline", text)
            self.assertIn("no MPI baseline", self.refuse(2, "bench", "chart", "baseline.json", "--svg", "chart.svg"))

    def svg_text(self, name):
        return " ".join(ElementTree.parse(self.folder / name).getroot().itertext())

    def test_sweep_writes_json_and_a_plot(self):
        sweep = small_but("--ranks", "1,2", "--tokens", "16,4", "--no-baseline", "--json", "sweep.json", "--svg", "sweep.svg")
        text = self.succeed("bench", "sweep", *sweep)
        self.assertIn("of memcpy", text)
        runs = self.read_json("sweep.json")["runs"]
        self.assertEqual([(r["settings"]["ranks"], r["settings"]["tokens"]) for r in runs], [(1, 4), (1, 16), (2, 4), (2, 16)])
        plot = self.svg_text("sweep.svg")
        for word in ("tokens per rank", "1 ranks, shm", "2 ranks, shm"):
            self.assertIn(word, plot)
        self.assertIn("verdict", self.succeed("bench", "compare", "sweep.json", "sweep.json"))

    def test_compare_gives_verdicts_and_refuses_other_settings(self):
        _, report = self.measure("first.json", "--no-baseline")
        faster = json.loads(json.dumps(report))
        faster["figures"]["dispatch"]["median_us"] /= 2
        self.write("faster.json", faster)
        lines = self.succeed("bench", "compare", "first.json", "faster.json").splitlines()
        line = next(l for l in lines if l.startswith("dispatch, median"))
        self.assertIn("0.500", line)
        self.assertTrue(line.endswith("better"), line)
        back = self.succeed("bench", "compare", "faster.json", "first.json").splitlines()
        self.assertTrue(next(l for l in back if l.startswith("dispatch, median")).endswith("worse"))
        combine = next(l for l in lines if l.startswith("combine, rows in expert_rows(), median"))
        self.assertTrue(combine.endswith("same"), combine)

        other = json.loads(json.dumps(report))
        other["settings"]["tokens"] = 64
        self.write("other.json", other)
        text = self.refuse(2, "bench", "compare", "first.json", "other.json")
        self.assertIn("tokens: 32 and 64", text)
        self.assertIn("--force", text)
        self.assertIn("verdict", self.succeed("bench", "compare", "first.json", "other.json", "--force"))
