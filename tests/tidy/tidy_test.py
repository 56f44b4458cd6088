#!/usr/bin/env python3
"""Shows that every rule of tidy.py can fail, that a clean repository passes, and what the C++ scanner gets right."""
import unittest

import cpp_scan
import tidy

README = "# R\n```cpp\nint main() {}\n```\n"
CLEAN = {
    "README.md": README,
    "examples/01_hello_exchange/main.cc": "int main() {}\n",
    "include/tokenyard/world.h": "#pragma once\n#include <vector>\n#include \"tokenyard/error.h\"\n",
    "src/world/CMakeLists.txt": "target_sources(tokenyard PRIVATE\n  store.cc)\n",
    "src/world/store.cc": '#include "tokenyard/world.h"\n#include "core/env.h"\n#include "world/store.h"\nint f(int a) {\n  return a;\n}\n',
    "src/world/store.h": "#pragma once\nint f(int a);\n",
}


def function(lines, name="f"):
    return f"int {name}() {{\n" + "  step();\n" * (lines - 2) + "}\n"


def found(rule, files):
    return list(rule(tidy.Repository(files)))


class RulesCanFail(unittest.TestCase):
    def test_a_clean_repository_passes(self):
        self.assertEqual(tidy.breaches(tidy.Repository(CLEAN)), [])

    def test_every_rule_is_shown_to_fail(self):
        shown = {name.removeprefix("test_rule_") for name in dir(self) if name.startswith("test_rule_")}
        self.assertEqual(shown, {rule.__name__ for rule in tidy.RULES})

    def breaks(self, rule, *samples):
        """Each sample, {path: text}, on its own gives exactly one breach."""
        for files in samples:
            with self.subTest(files={path: text[:60] for path, text in files.items()}):
                self.assertEqual(len(found(rule, files)), 1, found(rule, files))

    def keeps(self, rule, *samples):
        for files in samples:
            with self.subTest(files={path: text[:60] for path, text in files.items()}):
                self.assertEqual(found(rule, files), [])

    def test_rule_file_sizes(self):
        self.breaks(tidy.file_sizes, {"include/tokenyard/a.h": "\n" * 251}, {"src/core/a.cc": "\n" * 601}, {"src/kernels/cuda/a.cu": "\n" * 451})
        self.keeps(tidy.file_sizes, {"include/tokenyard/a.h": "\n" * 250}, {"src/core/a.cc": "\n" * 600}, {"src/core/a.h": "\n" * 400})

    def test_rule_function_sizes(self):
        self.breaks(tidy.function_sizes, {"src/core/a.cc": function(71)}, {"src/core/a.cc": "namespace a {\nclass B {\n" + function(71) + "};\n}\n"},
                    {"src/core/a.cc": "A::A()\n    : b_{1}, c_(2) {\n" + "  step();\n" * 70 + "}\n"}, {"src/kernels/cuda/a.cu": function(101)},
                    {"tests/unit/a_test.cc": "TEST(A, b) {\n" + "  step();\n" * 70 + "}\n"})
        self.keeps(tidy.function_sizes, {"src/core/a.cc": function(70)}, {"src/kernels/cuda/a.cu": function(100)},
                   {"src/core/a.cc": "constexpr int kTable[] = {\n" + "  1,\n" * 100 + "};\n"})

    def test_rule_parameters(self):
        self.breaks(tidy.parameters, {"src/core/a.h": "void f(int a, int b, int c, int d, int e, int f, int g);\n"},
                    {"src/core/a.cc": "A::A(int a, int b, int c, int d,\n     int e, int f, int g) : a_{a} {\n}\n"},
                    {"src/core/a.h": "template <class A, class B, class C, class D, class E, class F, int G>\nclass H;\n"})
        self.keeps(tidy.parameters, {"src/core/a.h": "void f(std::map<int, int> a, int b = g(1, 2), A c = {1, 2}, int d, int e, int f);\n"},
                   {"tests/unit/a_test.cc": "INSTANTIATE_TEST_SUITE_P(a, b, c, d, e, f, g);\n"})

    def test_rule_macros(self):
        self.breaks(tidy.macros, {"src/core/a.h": "#define FOO 1\n"}, {"src/core/a.h": "".join(f"#define TY_{i} 1\n" for i in range(11))})
        self.keeps(tidy.macros, {"src/core/a.h": "".join(f"#define TY_{i} 1\n" for i in range(10))}, {"src/a.cc": '#define HWY_TARGET_INCLUDE "a.cc"\n'})

    def test_rule_dependency_direction(self):
        def includes(path, header):
            return {path: f'#include "{header}"\n'}
        self.breaks(tidy.dependency_direction, includes("src/core/a.h", "world/store.h"), includes("src/core/a.h", "tokenyard/exchange.h"),
                    includes("src/memory/a.cc", "kernels/cpu/kernels.h"), includes("src/kernels/cpu/a.cc", "memory/doorbell.h"),
                    includes("src/placement/a.h", "protocol/arena.h"), includes("src/exchange/a.cc", "collective/call.h"),
                    includes("include/tokenyard/dtype.h", "tokenyard/world.h"), includes("src/unheard_of/a.cc", "core/env.h"),
                    includes("src/exchange/a.cc", "unheard_of/a.h"))
        self.keeps(tidy.dependency_direction, includes("src/placement/a.h", "protocol/host_device.h"), includes("src/exchange/a.cc", "kernels/cpu/kernels.h"),
                   includes("apps/tokenyard/main.cc", "exchange/engine.h"), includes("src/memory/a.cc", "tokenyard/world.h"))

    def test_rule_public_headers_are_light(self):
        self.breaks(tidy.public_headers_are_light, {"include/tokenyard/a.h": "#include <cuda_runtime.h>\n"}, {"include/tokenyard/a.h": "#include <fmt/core.h>\n"},
                    {"src/core/a.h": "#include <nlohmann/json.hpp>\n"})
        self.keeps(tidy.public_headers_are_light, {"src/core/a.cc": "#include <nlohmann/json.hpp>\n"}, {"src/core/a.h": "#include <tl/expected.hpp>\n"},
                   {"apps/tokenyard/a.h": "#include <nlohmann/json_fwd.hpp>\n"})

    def test_rule_names_are_snake_case(self):
        self.breaks(tidy.names_are_snake_case, {"src/core/ThreadPool.cc": ""}, {"tests/unit/a-test.cc": ""})
        self.keeps(tidy.names_are_snake_case, {"src/core/thread_pool.cc": ""}, {"CONTRIBUTING.md": ""})

    def test_rule_pragma_once(self):
        self.breaks(tidy.pragma_once, {"src/core/a.h": "int a();\n"})

    def test_rule_conditions(self):
        self.breaks(tidy.conditions, {"src/core/a.cc": "#ifdef TY_CUDA\n#endif\n"}, {"src/core/a.h": "#if !defined(NDEBUG)\n#endif\n"})
        self.keeps(tidy.conditions, {"src/core/a.h": "#ifdef __CUDACC__\n#else\n#endif\n"}, {"src/core/a.cc": "#if HWY_ONCE\n#endif\n"},
                   {"src/kernels/cpu/a_inl.h": "#if defined(TY_A_INL) == defined(HWY_TARGET_TOGGLE)\n#ifdef TY_A_INL\n#endif\n"})

    def test_rule_forbidden_words(self):
        marker, home, temporary = "TO" + "DO", "/ho" + "me/me/x", "/t" + "mp/x"
        self.breaks(tidy.forbidden_words, {"docs/a.md": f"{marker}: write\n"}, {"src/core/a.cc": f'f("{home}");\n'}, {"dev": f"cd {temporary}\n"},
                    {"src/world/a.cc": 'getenv("A");\n'}, {"apps/tokenyard/a.cc": 'std::getenv("A");\n'}, {"src/core/a.cc": "std::cout << 1;\n"},
                    {"src/core/a.cc": 'printf("a");\n'}, {"src/core/a.cc": 'std::fprintf(stderr, "a");\n'})
        self.keeps(tidy.forbidden_words, {"src/core/env.cc": 'std::getenv("A");\n'}, {"apps/tokenyard/a.cc": 'fmt::print("a");\n'},
                   {"src/core/a.cc": '// printf("a") is not called\nstd::snprintf(b, 1, "a");\n'})

    def test_rule_layout(self):
        self.breaks(tidy.layout, {"src/core/a.cc": "/" * 141 + "\n"}, {"src/core/a.cc": "\tf();\n"}, {"src/core/a.cc": "f(); \n"}, {"src/core/a.cc": "f();"})

    def test_rule_listed_in_cmake(self):
        self.breaks(tidy.listed_in_cmake, {"src/core/a.cc": "", "src/core/CMakeLists.txt": "ba.cc a.cce"}, {"src/core/a.cc": ""})
        self.keeps(tidy.listed_in_cmake, {"src/core/a.cc": "", "src/core/CMakeLists.txt": "target_sources(t PRIVATE a.cc)"},
                   {"apps/t/sub/a.cc": "", "apps/t/CMakeLists.txt": "sub/a.cc"},
                   {"src/kernels/cuda/a.cu": "", "src/kernels/cuda/CMakeLists.txt": "file(GLOB s ${HERE}/*.cu)"})
        self.breaks(tidy.listed_in_cmake, {"src/kernels/cuda/a.cc": "", "src/kernels/cuda/CMakeLists.txt": "file(GLOB s ${HERE}/*.cu)"})

    def test_rule_kernels_are_preloaded(self):
        kernel = "template <int kN>\n__global__ void __launch_bounds__(f(1) * 2) sum(const __grid_constant__ Args args) {\n}\n"
        self.breaks(tidy.kernels_are_preloaded, {"src/kernels/cuda/a.cu": kernel},
                    {"src/kernels/cuda/a.cu": kernel + "const Preloaded preloaded({{sum_up<1>}});\n"},
                    {"src/kernels/cuda/a.cuh": "__global__ void sum(Args args);\n"})
        self.keeps(tidy.kernels_are_preloaded, {"src/kernels/cuda/a.cu": kernel + "const cuda::Preloaded preloaded({{other},\n  {sum<1>}});\n"},
                   {"src/kernels/cuda/a.cuh": kernel, "src/kernels/cuda/a.cu": "const Preloaded preloaded({{sum<1>, kAllSharedMemory}});\n"},
                   {"src/kernels/cuda/a.cu": kernel + "constexpr auto* kSum = sum<1>;\nconst Preloaded preloaded({{kSum}});\n"},
                   {"tests/device/hold.cu": kernel})

    def test_rule_pages_show_examples(self):
        example = {"examples/01_hello_exchange/main.cc": "int main() {}\n"}
        self.breaks(tidy.pages_show_examples, {**example, "README.md": README.replace("main", "f")}, example)

    def test_rule_errors_are_documented(self):
        header = {"include/tokenyard/error.h": "enum class Phase : std::uint8_t {\n  none,\n  split,  // a\n  gather,\n};\n"}
        self.breaks(tidy.errors_are_documented, {**header, "docs/errors.md": "`split`"})
        self.keeps(tidy.errors_are_documented, {**header, "docs/errors.md": "`split`, `gather`"})


class Scanner(unittest.TestCase):
    def test_names_lines_and_parameters(self):
        text = (
            'const char* kText = "void no(int a) {";\n'              # 1
            "namespace a {\n"                                          # 2
            "struct alignas(64) S {\n"                                 # 3
            "  explicit S(int a = f(1, 2)) : a_{a}, b_(1) {\n  }\n"    # 4-5
            "  bool operator()(int x, int y) const { return x < y; }\n"  # 6
            "  bool operator==(const S&) const = default;\n"           # 7
            "};\n"                                                     # 8
            "template <class T, int N = 3>\n"                          # 9
            "  requires(N > 2)\n"                                      # 10
            "auto g(T a, std::pair<int, T> b, S c = {}) -> int {\n"    # 11
            "  if (a) {\n    return 1'000;\n  }\n  return '}';\n}\n"   # 12-16
            "const auto kLambda = [](int a) { return a; };\n"          # 17
            "DEFINE_SOMETHING(S, a, b)\n"                              # 18
            "void h() {\n}\n"                                          # 19-20
            "}\n")
        bodies, declarations = cpp_scan.scan(text)
        self.assertEqual([(f.name, f.first_line, f.last_line, f.parameters) for f in bodies],
                         [("S", 4, 5, 1), ("operator()", 6, 6, 2), ("g", 9, 16, 3), ("h", 19, 20, 0)])
        self.assertEqual([(f.name, f.parameters) for f in declarations], [("operator==", 1)])
        self.assertEqual(cpp_scan.template_parameters(text), [(9, 2)])


if __name__ == "__main__":
    unittest.main()
