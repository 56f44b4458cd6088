"""What cannot work is refused before any process starts: exit code 2, one line with the value, the reason and the remedy."""

import os
import time
import unittest

from command_line import CommandLineTest

# Arguments, what the line must say is wrong, and what it must say to do.
CASES = [
    ("bench --top-k 9 --experts 7", "--top-k 9 with --experts 7", "use --top-k 7 or --experts 9"),
    ("bench --ranks 0", "--ranks 0: out of range", "from 1 to"),
    ("bench --ranks 65", "--ranks 65: out of range", "from 1 to 64"),
    ("bench --tokens -1", "--tokens -1: out of range", "from 1 to"),
    ("bench --hidden-size 0", "--hidden-size 0: out of range", "from 1 to"),
    ("bench --hidden-size 7", "14 bytes, which is no multiple of 16", "use --hidden-size 8"),
    ("bench --hidden-size 7169", "14338 bytes, which is no multiple of 16", "use --hidden-size 7168 or 7176"),
    ("bench --experts 0", "--experts 0: out of range", "from 1 to"),
    ("bench --top-k 65", "--top-k 65: out of range", "from 1 to 64"),
    ("bench --dtype float7", 'unknown dtype "float7"', "bfloat16"),
    ("bench --dtype int64", "--dtype int64", "use float64, float32"),
    ("bench --layout diagonal", 'unknown layout "diagonal"', "expert_major"),
    ("bench --mode fast", 'unknown mode "fast"', "throughput, latency"),
    ("bench --sizing tight", 'unknown sizing "tight"', "exact, capacity"),
    ("bench --transport pigeon", 'unknown transport "pigeon"', "inproc"),
    ("bench --preset gpt-9", "gpt-9", "deepseek-v3"),
    ("bench --preset deepseek-v3 --top-k 2", "--top-k with --preset deepseek-v3", "leave one of the two out"),
    ("bench --mode latency --sizing exact", "--sizing exact with --mode latency", "use --sizing capacity"),
    ("bench --layout rank_slots", "--layout rank_slots with --mode throughput", "use --mode latency"),
    ("bench --placement tp:3 --ranks 4", "4 ranks cannot be cut into groups of 3", "use a divisor"),
    ("bench --placement tp:0", "--placement tp:0", "use a divisor"),
    ("bench --placement tp:two", '"two" is no count', "tp:2"),
    ("bench --placement round", "--placement round: unknown", "use uniform, tp:N, replicated:N"),
    ("bench --placement missing.json", "missing.json: cannot be read", "check the path"),
    ("bench --placement garbage.json", "--placement garbage.json", ""),
    ("bench --placement two_ranks.json --ranks 4 --experts 2 --top-k 1", "has 2 ranks and 2 experts, the run 4 and 2", "use --ranks 2 --experts 2"),
    ("bench --skew -1", "--skew -1", "from 0 (uniform) to 10"),
    ("bench --iterations 0", "--iterations 0: out of range", "from 1 to"),
    ("bench --threads 0", "--threads 0: out of range", "from 1 to"),
    ("bench --timeout-ms 0", "--timeout-ms 0: out of range", "from 1 to"),
    ("bench --tokens 4000000 --ranks 64", "exceed this machine's", "use fewer --tokens"),
    ("bench --json nowhere/out.json", "nowhere does not exist", "create it"),
    ("bench --json .", "is a folder", "name a file in it"),
    ("bench --ranks many", "many", "see 'tokenyard bench --help'"),
    ("bench --frobnicate", "--frobnicate", "see 'tokenyard bench --help'"),
    ("bench sweep --ranks 2,0", "--ranks 0: out of range", "from 1 to"),
    ("bench sweep --tokens 16 --svg nowhere/plot.svg", "nowhere does not exist", "create it"),
    ("bench compare missing.json missing.json", "missing.json: cannot be read", "check the path"),
    ("bench compare garbage.json garbage.json", "is no file of 'tokenyard bench --json'", "write one with it"),
    ("bench chart missing.json --svg chart.svg", "missing.json: cannot be read", "check the path"),
    ("bench chart missing.json", "--svg", "see 'tokenyard bench chart --help'"),
    ("bench layer --preset gpt-9", "gpt-9", "deepseek-v3"),
    ("bench layer --preset gpt-oss-20b", "--preset gpt-oss-20b", "use another"),
    ("bench layer --device cpu", "--device is cpu", "measured on cuda"),
    ("bench layer --ranks 1", "--ranks is 1", "2 or more"),
    ("bench layer --mode fast", 'unknown mode "fast"', "throughput, latency"),
    ("demo --text missing.txt", "missing.txt: cannot be read", "check the path"),
    ("demo --text empty.txt", "is empty", "name a file with text"),
    ("demo --preset nobody", "nobody", "qwen3-30b-a3b"),
    ("demo --hidden-size 3", "12 bytes, which is no multiple of 16", "use a multiple of 4"),
    ("demo --dtype fp8", "--dtype fp8", "use float32 or bfloat16"),
    ("demo --ranks 0", "--ranks 0: out of range", "from 1 to"),
    ("demo --out garbage.json", "--out garbage.json: cannot be created", "name a folder of yours"),
    ("verify --ranks 0", "--ranks 0: out of range", "from 1 to 16"),
    ("verify --timeout-ms 1", "--timeout-ms 1: too short", "give at least 100"),
    ("topo --ranks 0", "--ranks 0: out of range", "from 1 to"),
    ("plan-memory --receive-rows -1", "--receive-rows -1", "0 for the bound"),
    ("plan-memory --ranks 70000", "--ranks 70000: out of range", "from 1 to 65535"),
    ("parallel --tp 1 --ep 8 --dp 1", "device_count = 1 is not outer_dp 1 * ep 8", "leave tp out"),
    ("parallel --tp 8 --nnodes 3", "device_count = 8 is no multiple of nnodes = 3", "change one"),
    ("parallel --device-count 8 --tp 4", "tp = 4 is no multiple of attn_tp = 8", "use tp 8"),
    ("parallel --tp 8 --nnodes 2 --transport shm", "transport shm does not leave a host, and nnodes = 2", "use nnodes 1"),
    ("parallel --ep 0", "ep = 0", "1..65535"),
    ("parallel --ep 2 --preset gpt-9", "gpt-9", "deepseek-v3"),
    ("parallel --ep 2 --preset deepseek-v3 --experts 4", "--experts with --preset", "leave one of the two out"),
    ("parallel --ep 2 --expert-width 4", "--expert-width 4 without --experts", "give both"),
    ("parallel --tp 3 --experts 4 --expert-width 4", "expert width 4 is no multiple of mlp_tp = 3", "another mlp_tp"),
    ("parallel --tp 8 --json nowhere/out.json", "nowhere does not exist", "create it"),
    ("launch -n 0 -- true", "--ranks 0", "give at least 1"),
    ("launch -n 2", "PROGRAM", "see 'tokenyard launch --help'"),
    ("fly", "fly", "see 'tokenyard --help'"),
    ("", "subcommand", "see 'tokenyard --help'"),
]


class UsageTest(CommandLineTest):
    def test_what_cannot_work_is_refused_with_reason_and_remedy(self):
        self.write("garbage.json", "{nothing")
        self.write("empty.txt", "")
        self.write("two_ranks.json", {"ranks": 2, "experts": [[{"ranks": [0], "share": 1}], [{"ranks": [1], "share": 1}]]})
        for arguments, reason, remedy in CASES:
            with self.subTest(arguments=arguments):
                process = self.run_program(*arguments.split())
                self.assertEqual(process.returncode, 2, process.stderr)
                self.assertEqual(process.stdout, "")
                self.assertRegex(process.stderr, r"\Aerror: .+\n\Z")  # one line
                self.assertIn(reason, process.stderr)
                self.assertIn(remedy, process.stderr)

    def test_refusals_come_at_once(self):
        start = time.monotonic()
        self.run_program("bench", "--top-k", 9, "--experts", 7)
        self.assertLess(time.monotonic() - start, 2)

    @unittest.skipIf(os.geteuid() == 0, "root may write everywhere")
    def test_a_folder_of_somebody_else_is_refused(self):
        self.assertIn("cannot be written", self.refuse(2, "bench", "--json", "/etc/tokenyard.json"))

    def test_without_mpi_its_transport_is_refused(self):
        text = self.refuse(2, "bench", "--transport", "mpi", env={"PATH": str(self.folder)})
        self.assertIn("--transport mpi", text)
        self.assertIn("use --transport shm", text)


if __name__ == "__main__":
    unittest.main()
