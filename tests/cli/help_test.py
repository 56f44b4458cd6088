"""Every command explains itself."""

import unittest

from command_line import CommandLineTest

COMMANDS = [
    [],
    ["demo"],
    ["bench"],
    ["bench", "sweep"],
    ["bench", "compare"],
    ["bench", "chart"],
    ["verify"],
    ["topo"],
    ["parallel"],
    ["plan-memory"],
    ["launch"],
]


class HelpTest(CommandLineTest):
    def test_every_command_has_help_with_examples_of_itself(self):
        for command in COMMANDS:
            with self.subTest(command=command):
                text = self.succeed(*command, "--help")
                self.assertIn("Examples:", text)
                examples = text.split("Examples:")[1]
                self.assertIn(" ".join(["tokenyard", *command]), examples)

    def test_the_list_of_commands_is_complete(self):
        text = self.succeed("--help")
        for command in COMMANDS[1:]:
            self.assertIn(command[0], text)
        for word in ("sweep", "compare", "chart"):
            self.assertIn(word, self.succeed("bench", "--help"))

    def test_version_names_the_revision(self):
        self.assertRegex(self.succeed("--version"), r"^tokenyard \d+\.\d+\.\d+ \(\S+\)\n$")

    def test_examples_parse(self):
        # What help shows must not be refused for its options. Programs and files of examples do not exist here.
        for command in (["parallel"], ["plan-memory"]):
            for line in self.succeed(*command, "--help").split("Examples:")[1].splitlines():
                if line.strip():
                    with self.subTest(line=line):
                        self.succeed(*line.split()[1:])


if __name__ == "__main__":
    unittest.main()
