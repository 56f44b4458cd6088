"""Runs the tokenyard program; the base of the tests beside it."""

import json
import os
import pathlib
import subprocess
import tempfile
import unittest

PROGRAM = os.environ.get("TOKENYARD_CLI", "tokenyard")


class CommandLineTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_program(self, *arguments, timeout=240, env=None):
        """The finished process; its output as text."""
        command = [PROGRAM, *map(str, arguments)]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout)

    def succeed(self, *arguments, **options):
        """Its stdout, after it ended with 0 and wrote no error."""
        process = self.run_program(*arguments, **options)
        self.assertEqual(process.returncode, 0, f"{arguments}: {process.stderr}{process.stdout[-2000:]}")
        self.assertNotIn("error:", process.stderr)
        return process.stdout

    def refuse(self, code, *arguments, **options):
        """Its one line of error, after it ended with `code`."""
        process = self.run_program(*arguments, **options)
        self.assertEqual(process.returncode, code, f"{arguments}: {process.stderr}{process.stdout[-2000:]}")
        lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        self.assertEqual(len(lines), 1, process.stderr)
        return lines[0]

    def write(self, name, content):
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def read_json(self, name):
        return json.loads((self.folder / name).read_text())
