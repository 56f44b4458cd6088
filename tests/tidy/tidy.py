#!/usr/bin/env python3
"""Checks the house style over the repository: sizes, names, dependency direction, forbidden things.

    tidy.py [repository]      prints one line per breach, ends with 1 when there is one

A rule is a function from a Repository to breaches; RULES lists them, tidy_test.py shows that each can fail.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import cpp_scan

MAX_LINE = 140
MAX_FILE = {"public header": 250, ".cc": 600, ".cu": 450}
MAX_FUNCTION, MAX_KERNEL_ROLE, MAX_PARAMETERS, MAX_TEMPLATE_PARAMETERS, MAX_MACROS = 70, 100, 6, 6, 10

CODE = {".h", ".cc", ".cu", ".cuh"}
TEXT = CODE | {".md", ".txt", ".cmake", ".in", ".json", ".py", ".sh", ".yml", ""}

# A folder may include itself and those of a lower level. Folders of one level do not include each other.
LEVELS = [
    ["core"],
    ["world", "parallel", "placement", "routing", "protocol", "plan"],
    ["memory", "port", "kernels"],
    ["collective", "exchange"],
    ["experts", "weights"],
    ["layer"],
    ["apps", "python"],
]
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
# (folder, header): the mark of arithmetic that kernels share; the collective exchange uses collectives as any caller does.
EXCEPTIONS = {("placement", "protocol/host_device.h"), ("routing", "protocol/host_device.h"), ("exchange", "tokenyard/collective.h")}
# Whose words a public header speaks: the lowest folder that may include it.
PUBLIC = {
    "error": "core", "dtype": "core", "tensor_view": "core", "quantise": "core", "options": "core",
    "world": "world", "launch": "world", "topo": "world", "parallel": "parallel", "placement": "placement", "routing": "routing",
    "device_routing": "routing", "collective": "collective", "exchange": "exchange", "experts": "experts", "device_experts": "experts",
    "layer": "layer", "norm": "layer", "safetensors": "weights", "weights": "weights", "tokenyard": "apps",
}
# Conditional compilation that no other means replaces: word -> what for.
CONDITIONS = {
    "__CUDACC__": "host and device share arithmetic",
    "__x86_64__": "one instruction of a busy wait", "__aarch64__": "one instruction of a busy wait",
    "HWY_ONCE": "Highway compiles a file once per instruction set", r"HWY_TARGET_TOGGLE|TY_\w+_INL": "the include guard Highway asks for",
    "CUDART_VERSION": "a call of the runtime that changed its name",
    "__clang__": "the compiler's name in a report",
    "__SANITIZE_ADDRESS__": "sanitizers need other limits", "__SANITIZE_THREAD__": "sanitizers need other limits",
}
# Macros that a dependency's interface makes us define.
FOREIGN_MACROS = re.compile(r"HWY_\w+|TY_\w+_INL$")
MARKERS = re.compile(r"\b(TODO|FIXME|XXX)\b")
MACHINE_PATHS = re.compile(r"(?<![\w./$}])/(work|home|root|Users|tmp|mnt|data)/\w")
PRINTS = re.compile(r"\bstd::(cout|cerr|clog)\b|(?<![\w.:>])(?:std::)?(?:printf|fprintf|puts|putchar|vprintf)\s*\(|\bfmt::print\w*\s*\(")
GETENV = re.compile(r"\b(secure_)?getenv\s*\(")
HEAVY = re.compile(r'#include <(nlohmann/(?!json_fwd)|CLI/|spdlog/)')


class Repository:
    """Path (str, relative, with '/') -> text of every text file that belongs to the repository."""

    def __init__(self, files):
        self.files = files

    @staticmethod
    def read(root):
        git = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
        if listed and listed.returncode == 0:
            paths = listed.stdout.splitlines()
        else:  # an unpacked archive, or a machine without git
            paths = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
        skipped = {"build", "out", ".git", ".venv"}
        return Repository({
            path: (root / path).read_text(encoding="utf-8") for path in sorted(paths)
            if PurePosixPath(path).suffix in TEXT and path.split("/")[0] not in skipped and (root / path).is_file()
            and "/corpus/" not in path and "__pycache__" not in path
        })

    def code(self, *roots, suffixes=CODE):
        for path, text in self.files.items():
            if PurePosixPath(path).suffix in suffixes and (not roots or path.split("/")[0] in roots):
                yield path, text


def numbered(text):
    return enumerate(text.splitlines(), start=1)


def file_sizes(repository):
    for path, text in repository.code():
        suffix = PurePosixPath(path).suffix
        kind = "public header" if path.startswith("include/") else suffix
        limit, lines = MAX_FILE.get(kind), len(text.splitlines())
        if limit and lines > limit:
            yield f"{path}:1: {lines} lines; a {kind} has at most {limit}: split it by subject"


def function_sizes(repository):
    for path, text in repository.code():
        limit = MAX_KERNEL_ROLE if PurePosixPath(path).suffix in (".cu", ".cuh") else MAX_FUNCTION
        for function in cpp_scan.scan(text)[0]:
            if function.lines > limit:
                yield f"{path}:{function.first_line}: {function.name} has {function.lines} lines, at most {limit}: name its parts"


def parameters(repository):
    for path, text in repository.code():
        bodies, declarations = cpp_scan.scan(text)
        for function in bodies + declarations:
            if function.parameters > MAX_PARAMETERS and not cpp_scan.MACRO_CALL.fullmatch(function.name):
                yield f"{path}:{function.first_line}: {function.name} has {function.parameters} parameters, at most {MAX_PARAMETERS}: use an Args struct"
        for line, count in cpp_scan.template_parameters(text):
            if count > MAX_TEMPLATE_PARAMETERS:
                yield f"{path}:{line}: {count} template parameters, at most {MAX_TEMPLATE_PARAMETERS}"


def macros(repository):
    ours = set()
    for path, text in repository.code():
        for line, content in numbered(text):
            found = re.match(r"\s*#\s*define\s+(\w+)", content)
            if not found or FOREIGN_MACROS.match(found.group(1)):
                continue
            ours.add(found.group(1))
            if not found.group(1).startswith("TY_"):
                yield f"{path}:{line}: macro {found.group(1)}: ours begin with TY_, and a function or constant is better"
    if len(ours) > MAX_MACROS:
        yield f"include/:1: {len(ours)} macros, at most {MAX_MACROS}: {', '.join(sorted(ours))}"


def folder_of(path):
    parts = path.split("/")
    if parts[0] == "src" and len(parts) > 2:
        return parts[1]
    if parts[0] == "include":
        return PUBLIC.get(PurePosixPath(path).stem)
    return parts[0] if parts[0] in LEVEL else None


def included_folder(header):
    parts = header.split("/")
    return PUBLIC.get(PurePosixPath(header).stem) if parts[0] == "tokenyard" else parts[0]


def dependency_direction(repository):
    for path, text in repository.code("include", "src", "apps", "python"):
        folder = folder_of(path)
        if folder not in LEVEL:
            yield f"{path}:1: no place in the dependency order: name it in LEVELS or PUBLIC of tests/tidy/tidy.py"
            continue
        for line, content in numbered(text):
            found = re.match(r'\s*#\s*include\s+"([^"]+)"', content)
            target = included_folder(found.group(1)) if found else None
            if target is None or "/" not in found.group(1) or target == folder or (folder, found.group(1)) in EXCEPTIONS:
                continue
            if path == "include/tokenyard/tokenyard.h":
                continue
            if target not in LEVEL:
                yield f'{path}:{line}: "{found.group(1)}": no such folder in LEVELS of tests/tidy/tidy.py'
            elif LEVEL[target] >= LEVEL[folder]:
                yield f'{path}:{line}: {folder} must not include "{found.group(1)}": {target} is not below it'


def public_headers_are_light(repository):
    for path, text in repository.code("include"):
        for line, content in numbered(text):
            if re.match(r"\s*#\s*include\s+<[^>]*[/.][^>]*>", content):
                yield f"{path}:{line}: public headers include only the standard library and each other"
    for path, text in repository.code("src", "apps", suffixes={".h", ".cuh"}):
        for line, content in numbered(text):
            if HEAVY.match(content.strip()):
                yield f"{path}:{line}: costs seconds in every file that includes it: keep it in a .cc"


def names_are_snake_case(repository):
    for path in repository.files:
        pure = PurePosixPath(path)
        if pure.suffix in CODE | {".py", ".sh"} and not re.fullmatch(r"[a-z0-9_]+", pure.stem):
            yield f"{path}:1: file names are snake_case"


def pragma_once(repository):
    for path, text in repository.code(suffixes={".h", ".cuh"}):
        if "#pragma once" not in text and not path.endswith("_inl.h"):
            yield f"{path}:1: #pragma once is missing"


def conditions(repository):
    for path, text in repository.code("include", "src", "apps"):
        for line, content in numbered(text):
            found = re.match(r"\s*#\s*(?:ifdef|ifndef|if|elif)\b(.*)", content)
            if found and not any(re.search(rf"\b{word}\b", found.group(1)) for word in CONDITIONS):
                yield f"{path}:{line}: conditional compilation: absence is a file (no_x.cc beside x.cc, chosen by CMake)"


def forbidden_words(repository):
    for path, text in repository.files.items():
        if path.startswith("tests/tidy/"):
            continue
        is_code = PurePosixPath(path).suffix in CODE
        code = cpp_scan.blank(text) if is_code else ""
        for line, content in numbered(text):
            if MARKERS.search(content):
                yield f"{path}:{line}: unfinished work belongs into an issue, not into the code"
            if MACHINE_PATHS.search(content) and path != "LICENSE":
                yield f"{path}:{line}: a path of one machine"
        for line, content in numbered(code):
            if GETENV.search(content) and path != "src/core/env.cc" and not path.startswith("tests/"):
                yield f"{path}:{line}: getenv: use env() of core/env.h, the only reader of the environment"
            if path.startswith(("src/", "include/")) and PRINTS.search(content):
                yield f"{path}:{line}: the library prints nothing: return it, throw it, or log it"


def layout(repository):
    for path, text in repository.code():
        for line, content in numbered(text):
            if len(content) > MAX_LINE:
                yield f"{path}:{line}: {len(content)} columns, at most {MAX_LINE}"
            if "\t" in content or content != content.rstrip():
                yield f"{path}:{line}: tab or trailing space"
        if text and not text.endswith("\n"):
            yield f"{path}:1: no newline at the end"


def listed_in_cmake(repository):
    for path, _ in repository.code("src", "apps", suffixes={".cc", ".cu"}):
        folder = PurePosixPath(path).parent
        lists = [text for name in (folder, *folder.parents) if (text := repository.files.get(f"{name}/CMakeLists.txt"))]
        name = re.escape(PurePosixPath(path).name)
        globbed = rf"GLOB[^)]*/\*{re.escape(PurePosixPath(path).suffix)}\)"
        if not lists or not re.search(rf"(?<![\w/]){name}\b|/{name}\b|{globbed}", lists[0]):
            yield f"{path}:1: not in {folder}/CMakeLists.txt: it is never built"


KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")
LISTED = re.compile(r"\bPreloaded preloaded\((.*?)\);|constexpr auto\* k\w+ = (\w+)<", re.DOTALL)


def kernels_are_preloaded(repository):
    sources = dict(repository.code("src", suffixes={".cu", ".cuh"}))
    listed = {word for text in sources.values() for names in LISTED.findall(text) for word in re.findall(r"\w+", " ".join(names))}
    for path, text in sources.items():
        for kernel in KERNEL.finditer(text):
            if kernel.group(1) not in listed:
                line = text.count("\n", 0, kernel.start()) + 1
                yield f"{path}:{line}: {kernel.group(1)} is in no Preloaded list: loading it later may wait for kernels that wait for peers"


# Pages that show a file: whoever copies from the page gets what was compiled and run.
SHOWN = {
    "examples/01_hello_exchange/main.cc": "README.md",
    "examples/05_checkpoint_to_layer/load_layer.h": "docs/checkpoint_to_layer.md",
    "examples/05_checkpoint_to_layer/main.cc": "docs/checkpoint_to_layer.md",
    "examples/05_checkpoint_to_layer/main.py": "docs/checkpoint_to_layer.md",
}


def pages_show_examples(repository):
    for path, page in SHOWN.items():
        example = repository.files.get(path)
        language = "python" if path.endswith(".py") else "cpp"
        if example is not None and f"```{language}\n{example}```" not in repository.files.get(page, ""):
            yield f"{page}:1: its example is not {path}, letter for letter"


def errors_are_documented(repository):
    header, page = repository.files.get("include/tokenyard/error.h", ""), repository.files.get("docs/errors.md", "")
    for body in re.findall(r"enum class (?:FailureKind|Phase)[^{]*\{(.*?)\};", header, re.DOTALL):
        for name in re.findall(r"^\s*(\w+),", body, re.MULTILINE):
            if name != "none" and f"`{name}`" not in page:
                yield f"docs/errors.md:1: says nothing about `{name}` of include/tokenyard/error.h"


RULES = [
    file_sizes, function_sizes, parameters, macros, dependency_direction, public_headers_are_light, names_are_snake_case, pragma_once,
    conditions, forbidden_words, layout, listed_in_cmake, kernels_are_preloaded, pages_show_examples, errors_are_documented,
]


def breaches(repository):
    return [breach for rule in RULES for breach in rule(repository)]


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
    repository = Repository.read(root)
    found = breaches(repository)
    print("\n".join(found + [f"tidy: {len(RULES)} rules over {len(repository.files)} files, {len(found)} breaches"]))
    return 1 if found or not repository.files else 0


if __name__ == "__main__":
    sys.exit(main())
