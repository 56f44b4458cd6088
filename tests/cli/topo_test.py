"""topo, plan-memory and launch."""

import json
import os
import sys

from command_line import CommandLineTest


class TopoTest(CommandLineTest):
    def test_json_has_ranks_links_and_backends(self):
        report = json.loads(self.succeed("topo", "--ranks", 3, "--json"))
        topology = report["topology"]
        self.assertEqual(topology["ranks"], 3)
        self.assertEqual(topology["links"], [["self" if r == p else "peer" for p in range(3)] for r in range(3)])
        self.assertEqual(len(set(topology["hosts"])), 1)
        self.assertEqual(report["usual_sm_budget"], 48)
        available = {backend["name"]: backend for backend in report["backends"]}
        for name in ("inproc", "shm"):
            self.assertEqual(available[name]["availability"], "available")
        for backend in report["backends"]:
            if backend["availability"] != "available":
                self.assertNotEqual(backend["reason"], "", backend)
                self.assertNotEqual(backend["remedy"], "", backend)

    def test_gpus_come_with_who_addresses_whom(self):
        report = json.loads(self.succeed("topo", "--json"))
        gpus = report["gpus"]
        cuda_peer = next(backend for backend in report["backends"] if backend["name"] == "cuda_peer")
        self.assertEqual(cuda_peer["availability"] == "available", len(gpus) > 0)
        for number, gpu in enumerate(gpus):
            self.assertEqual(len(gpu["peer_access"]), len(gpus))
            self.assertTrue(gpu["peer_access"][number])
            self.assertGreater(gpu["memory_bytes"], 0)

    def test_text_shows_the_same(self):
        text = self.succeed("topo")
        self.assertIn("link to 1", text)
        self.assertIn("inproc", text)

    def test_under_a_launcher_rank_0_shows_its_world(self):
        text = self.succeed("launch", "-n", 2, "--no-prefix", "--", os.environ["TOKENYARD_CLI"], "topo", "--json")
        self.assertEqual(json.loads(text)["topology"]["ranks"], 2)


class PlanMemoryTest(CommandLineTest):
    def plan(self, *arguments):
        return json.loads(self.succeed("plan-memory", *arguments, "--json"))

    def test_the_total_is_the_sum_for_any_number_of_ranks(self):
        for ranks in (1, 64, 1000):
            report = self.plan("--ranks", ranks, "--tokens", 128)
            self.assertEqual(report["bytes_per_rank"], sum(item["bytes"] for item in report["items"]))
            for item in report["items"]:
                self.assertNotEqual(item["formula"], "")

    def test_receive_buffers_follow_their_formula(self):
        def receive(*arguments):
            return sum(item["bytes"] for item in self.plan("--tokens", 128, "--ranks", 4, *arguments)["items"] if "receive" in item["purpose"])

        row_bytes = 7168 * 2
        self.assertGreaterEqual(receive(), 2 * 4 * 128 * row_bytes)
        self.assertGreaterEqual(receive("--depth", 3) - receive(), 4 * 128 * row_bytes)
        self.assertLess(receive("--receive-rows", 100), receive())

    def test_text_names_the_total(self):
        self.assertRegex(self.succeed("plan-memory", "--tokens", 16), r"total +[\d ]+ +[\d.]+ \w*B")


class LaunchTest(CommandLineTest):
    SCRIPT = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])"

    def test_ranks_know_who_they_are(self):
        lines = self.succeed("launch", "-n", 3, "--", sys.executable, "-c", self.SCRIPT).splitlines()
        self.assertEqual(sorted(lines), [f"[rank {rank}] {rank} 3" for rank in range(3)])

    def test_options_after_the_dashes_belong_to_the_program(self):
        text = self.succeed("launch", "-n", 1, "--no-prefix", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", "-n", "7", "--help")
        self.assertEqual(text, "['-n', '7', '--help']\n")

    def test_a_failing_rank_is_named(self):
        text = self.refuse(1, "launch", "-n", 2, "--", sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['RANK']) * 3)")
        self.assertIn("rank 1 ended with exit code 3", text)

    def test_a_signal_is_named(self):
        text = self.refuse(1, "launch", "-n", 1, "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
        self.assertIn("rank 0 was ended by signal 9", text)

    def test_ranks_end_after_the_time_they_were_given(self):
        text = self.refuse(1, "launch", "-n", 2, "--run-timeout-ms", 500, "--", "sleep", 60, timeout=30)
        self.assertIn("signal 9", text)

    def test_a_program_that_is_not_there_is_an_operating_failure(self):
        self.assertIn("no_such_program", self.refuse(1, "launch", "-n", 1, "--", "no_such_program"))
