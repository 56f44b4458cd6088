"""parallel: sizes, the rank table, and what each rank holds."""

import json

from command_line import CommandLineTest


class ParallelTest(CommandLineTest):
    def solve(self, *arguments):
        return json.loads(self.succeed("parallel", *arguments, "--json", "-"))

    def test_json_has_sizes_and_ranks(self):
        report = self.solve("--tp", 8, "--ep", 4, "--nnodes", 2)
        sizes = {key: value for key, value in report.items() if key != "ranks"}
        self.assertEqual(
            sizes,
            dict(nnodes=2, device_count=8, dp=1, tp=8, ep=4, cp=1, outer_dp=1, attn_dp=1, attn_tp=8, attn_cp=1, mlp_tp=2),
        )
        self.assertEqual([rank["node"] for rank in report["ranks"]], [0] * 4 + [1] * 4)
        self.assertEqual([(rank["ep"], rank["mlp_tp"]) for rank in report["ranks"]], [(r // 2, r % 2) for r in range(8)])
        held = [(rank["expert_window"], rank["expert_shard"]) for rank in report["ranks"]]
        self.assertEqual(held, [([r // 2, 4], [r % 2, 2]) for r in range(8)])

    def test_text_shows_the_same(self):
        text = self.succeed("parallel", "--tp", 8, "--ep", 4, "--nnodes", 2)
        self.assertIn("8 ranks on 2 nodes", text)
        self.assertRegex(text, r"experts +outer_dp 1 x ep 4 x mlp_tp 2")
        self.assertEqual(len([line for line in text.splitlines() if line[:1].isdigit() and "ranks" not in line]), 8)
        self.assertRegex(text, r"\n7 .* window 3/4 +1/2\n")

    def test_experts_have_windows_and_shards(self):
        report = self.solve("--device-count", 8, "--ep", 2, "--outer-dp", 2, "--experts", 5, "--expert-width", 6)
        held = [(rank["first_expert"], rank["num_local_experts"], rank["expert_rows"]) for rank in report["ranks"]]
        self.assertEqual(held, [(0, 3, [0, 3]), (0, 3, [3, 3]), (3, 2, [0, 3]), (3, 2, [3, 3])] * 2)

    def test_ranks_without_experts_say_so(self):
        report = self.solve("--tp", 4, "--ep", 4, "--experts", 3)
        self.assertEqual([rank["num_local_experts"] for rank in report["ranks"]], [1, 1, 1, 0])
        self.assertRegex(self.succeed("parallel", "--tp", 4, "--ep", 4, "--experts", 3), r"\n3 .* none +0/1\n")

    def test_a_preset_names_experts_and_width(self):
        text = self.succeed("parallel", "--tp", 8, "--ep", 4, "--preset", "deepseek-v3")
        self.assertRegex(text, r"\n7 .* 192-255 +1/2 +1024-2047\n")

    def test_json_may_go_to_a_file(self):
        self.assertIn("written: sizes.json", self.succeed("parallel", "--dp", 4, "--ep", 4, "--json", "sizes.json"))
        self.assertEqual(self.read_json("sizes.json")["attn_dp"], 4)
