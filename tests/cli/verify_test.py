"""verify finds nothing where nothing is wrong, and something where something is."""

from command_line import CommandLineTest


class VerifyTest(CommandLineTest):
    def test_this_machine_is_correct(self):
        lines = self.succeed("verify", "--quick", "--ranks", 3).splitlines()
        transports = {line.split()[1] for line in lines[1:-1] if line.startswith("ok")}
        self.assertLessEqual({"inproc", "shm"}, transports)
        self.assertRegex(lines[-1], r"^\d+ ok, 0 failed, \d+ skipped in ")
        self.assertGreater(int(lines[-1].split()[0]), 60)
        for line in lines[1:-1]:
            if line.startswith("skipped"):
                self.assertRegex(line, r": .+")  # the reason
        self.assertTrue(any("a killed rank is named by the others" in line and line.startswith("ok") for line in lines))

    def test_one_flipped_bit_is_found_and_dumped(self):
        process = self.run_program("verify", "--random", 0, "--ranks", 2, "--self-test", "--dump")
        self.assertEqual(process.returncode, 1)
        failed = [line for line in process.stdout.splitlines() if line.startswith("FAIL")]
        self.assertGreater(len(failed), 20)
        self.assertRegex(failed[0], r"row of rank \d, slot \d+: expected [0-9a-f]+ from byte 0, seen [0-9a-f]+ from byte 0")
        self.assertRegex(process.stderr, r"\Aerror: \d+ checks failed.*--seed 1\n\Z")

    def test_without_dump_a_failure_is_short(self):
        process = self.run_program("verify", "--random", 0, "--ranks", 1, "--self-test")
        self.assertEqual(process.returncode, 1)
        self.assertIn("row of rank 0, slot 0 differs; --dump shows both values", process.stdout)
