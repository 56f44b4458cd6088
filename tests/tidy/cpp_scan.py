"""Just enough C++ to find functions, parameters and templates: text without comments and strings, and brace matching.

It is no parser: it reads code formatted as this repository's is, and tidy_test.py shows what it must get right.
"""
import re
from dataclasses import dataclass

OPEN, CLOSE = "([{", ")]}"
# What may stand between a function's ')' and its '{'.
QUALIFIERS = {"const", "noexcept", "override", "final", "mutable", "try", "volatile", "&", "&&"}
CONTAINER = re.compile(r"\b(namespace|class|struct|union)\b|\bextern\s*\"")
MACRO_CALL = re.compile(r"[A-Z][A-Z0-9_]+")
CONTROL = {"if", "for", "while", "switch", "catch", "return", "sizeof", "decltype", "requires", "noexcept", "alignas", "static_assert"}


@dataclass
class Function:
    name: str
    first_line: int
    last_line: int
    parameters: int

    @property
    def lines(self):
        return self.last_line - self.first_line + 1


def blank(text):
    """The text with comments, string and character contents and preprocessor lines turned to spaces; lines stay where they are."""
    pattern = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"([^()\s\\]{0,16})\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F_])\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)

    def spaces(match):
        found = match.group(0)
        if found[0] in "\"'R":
            return '"' + re.sub(r"[^\n]", " ", found[1:-1]) + '"'
        return re.sub(r"[^\n]", " ", found)

    text = pattern.sub(spaces, text)
    return re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", lambda m: re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.MULTILINE)


def match(text, start):
    """Index just behind the bracket that closes the one at start."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in OPEN:
            depth += 1
        elif text[i] in CLOSE:
            depth -= 1
            if depth == 0:
                return i + 1
    return len(text)


def commas(text):
    """Number of elements of a comma-separated list; commas within brackets and template arguments do not count."""
    if text.strip() in ("", "void"):
        return 0
    count, i, angle = 1, 0, 0
    while i < len(text):
        c = text[i]
        if c in OPEN:
            i = match(text, i)
            continue
        if c == "<":
            angle += 1
        elif c == ">" and text[i - 1] not in "-=" and angle > 0:
            angle -= 1
        elif c == "," and angle == 0:
            count += 1
        i += 1
    return count


def without_templates(head):
    """A declaration without its leading template<...> and its template arguments' parentheses."""
    found = re.search(r"\btemplate\s*<", head)
    while found:
        depth, i = 0, found.end() - 1
        while i < len(head):
            if head[i] == "<":
                depth += 1
            elif head[i] == ">" and head[i - 1] != "-":
                depth -= 1
                if depth == 0:
                    break
            i += 1
        head = head[:found.start()] + " " * (i + 1 - found.start()) + head[i + 1:]
        found = re.search(r"\btemplate\s*<", head)
    return head


def signature(head):
    """(name, number of parameters) of the function that this declaration declares, or None."""
    head = without_templates(head)
    i = 0
    while i < len(head):
        if head[i] == "=" and not re.search(r"operator\s*[=!<>+\-*/|&^%]*$", head[:i]):
            return None  # a variable
        if head[i] == "(":
            name = re.search(r"(operator\s*(?:\(\s*\)|[^\w\s(]+|\w+)|~?[A-Za-z_]\w*)\s*$", head[:i])
            end = match(head, i)
            if name and name.group(1).split()[0] not in CONTROL:
                following = head[end:].lstrip()
                if name.group(1) == "operator" and following.startswith("("):  # operator()(...)
                    return "operator()", commas(following[1:match(following, 0) - 1])
                return name.group(1), commas(head[i + 1:end - 1])
            i = end
            continue
        if head[i] in OPEN:
            i = match(head, i)
            continue
        i += 1
    return None


def is_init_brace(head):
    """Whether a '{' behind this head initialises a member or base in a constructor's list instead of opening the body."""
    found = re.search(r"\)\s*(?:noexcept\s*)?:(?!:)", head)
    if not found:
        return False
    word = re.search(r"([A-Za-z_]\w*|>)\s*$", head)
    return bool(word) and word.group(1) not in QUALIFIERS


def is_body(head):
    stripped = without_templates(head).strip()
    if CONTAINER.search(re.sub(r"\(.*", "", stripped, flags=re.DOTALL)) and not re.search(r"\)\s*(const|noexcept|override|final|->.*)*\s*$", stripped):
        return False
    return signature(head) is not None


def scan(text):
    """All functions (bodies) and declarations (lines 0..0 of body) of a file: two lists of Function."""
    code = blank(text)
    bodies, declarations = [], []
    line_of = [0]
    for i, c in enumerate(code):
        if c == "\n":
            line_of.append(i)

    def line(index):
        low, high = 0, len(line_of)
        while low < high:
            middle = (low + high) // 2
            if line_of[middle] < index or middle == 0:
                low = middle + 1
            else:
                high = middle
        return low

    def first(start, end):
        while start < end and code[start].isspace():
            start += 1
        return start

    def walk(i, end):
        start = i
        while i < end:
            c = code[i]
            if c in "([":
                head, i = code[start:i].strip(), match(code, i)
                if MACRO_CALL.fullmatch(head) and not re.match(r"\s*[{;:]", code[i:i + 200]):
                    start = i  # a macro call that needs no semicolon
                continue
            if c in ";}":
                found = signature(code[start:i]) if c == ";" else None
                if found:
                    declarations.append(Function(found[0], line(first(start, i)), line(i), found[1]))
                start = i + 1
            elif c == ":" and re.search(r"(^|\s)(public|private|protected)\s*$", code[start:i]) and code[i + 1:i + 2] != ":":
                start = i + 1
            elif c == "{":
                close = match(code, i)
                head = code[start:i]
                if is_init_brace(head):
                    i = close
                    continue
                if is_body(head):
                    name, parameters = signature(head)
                    bodies.append(Function(name, line(first(start, i)), line(close - 1), parameters))
                    start = close
                elif CONTAINER.search(re.sub(r"\(.*", "", without_templates(head), flags=re.DOTALL)) and "=" not in without_templates(head):
                    walk(i + 1, close - 1)
                    start = close
                i = close
                continue
            i += 1

    walk(0, len(code))
    return bodies, declarations


def template_parameters(text):
    """(line, number of parameters) of every template<...>."""
    code = blank(text)
    found = []
    for start in re.finditer(r"\btemplate\s*<", code):
        depth, i = 0, start.end() - 1
        while i < len(code):
            if code[i] == "<":
                depth += 1
            elif code[i] == ">" and code[i - 1] != "-":
                depth -= 1
                if depth == 0:
                    break
            i += 1
        found.append((code.count("\n", 0, start.start()) + 1, commas(code[start.end():i])))
    return found
