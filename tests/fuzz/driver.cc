// Runs a fuzz target without libFuzzer: every file of a corpus folder, then seeded inputs, half of them random bytes and
// half of them mutated corpus files. The same seed gives the same inputs; an abort leaves its input in ./fuzz-crash.
//   <target> [--runs=N] [--seed=N] [corpus folder or single file]

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Input = std::vector<std::uint8_t>;
using Random = std::mt19937_64;

constexpr std::size_t kMaxBytes = 4096;

const Input* current = nullptr;  // what the crash handler writes

void write_current(int signal_number) {
  const int file = open("fuzz-crash", O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (current != nullptr && file >= 0 && write(file, current->data(), current->size()) >= 0) {
    constexpr std::string_view text = "fuzz: the input of this crash is in ./fuzz-crash; give that file as the argument to replay it\n";
    [[maybe_unused]] const auto written = write(STDERR_FILENO, text.data(), text.size());
  }
  std::signal(signal_number, SIG_DFL);
  std::raise(signal_number);
}

void run(const Input& input) {
  current = &input;
  LLVMFuzzerTestOneInput(input.data(), input.size());
  current = nullptr;
}

std::size_t below(Random& random, std::size_t end) { return end == 0 ? 0 : random() % end; }

Input random_bytes(Random& random) {
  Input input(below(random, std::size_t{1} << below(random, 13)));
  for (auto& byte : input) byte = static_cast<std::uint8_t>(random());
  return input;
}

Input mutated(Random& random, Input input) {
  for (std::size_t step = 1 + below(random, 4); step > 0; --step) {
    const auto at = input.begin() + static_cast<std::ptrdiff_t>(below(random, input.size() + 1));
    const auto size = static_cast<std::ptrdiff_t>(below(random, 1 + std::min<std::size_t>(64, input.end() - at)));
    switch (random() % 5) {
      case 0:
        if (at != input.end()) *at ^= static_cast<std::uint8_t>(1U << random() % 8);
        break;
      case 1:
        if (at != input.end()) *at = static_cast<std::uint8_t>(random());
        break;
      case 2:
        input.erase(at, at + size);
        break;
      case 3: {
        const Input piece(at, at + size);
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(below(random, input.size() + 1)), piece.begin(), piece.end());
        break;
      }
      default:
        input.insert(at, static_cast<std::uint8_t>(random()));
    }
  }
  if (input.size() > kMaxBytes) input.resize(kMaxBytes);
  return input;
}

std::vector<Input> read_corpus(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(path)) {
    for (const auto& entry : std::filesystem::directory_iterator(path)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
  } else if (std::filesystem::exists(path)) {
    files.push_back(path);
  }
  std::vector<Input> corpus;
  for (const auto& file : files) {
    std::ifstream stream(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
  }
  return corpus;
}

bool read_number(std::string_view argument, std::string_view name, std::uint64_t& value) {
  if (!argument.starts_with(name)) return false;
  const auto text = argument.substr(name.size());
  return std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc{};
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t runs = 5000;
  std::uint64_t seed = 1;
  std::vector<Input> corpus;
  for (int i = 1; i < argc; ++i) {
    if (read_number(argv[i], "--runs=", runs) || read_number(argv[i], "--seed=", seed)) continue;
    corpus = read_corpus(argv[i]);
  }
  for (const int signal_number : {SIGSEGV, SIGABRT, SIGFPE, SIGILL, SIGBUS}) std::signal(signal_number, write_current);

  run({});
  for (const Input& input : corpus) run(input);
  Random random(seed);
  for (std::uint64_t i = 0; i < runs; ++i) {
    const bool mutate = !corpus.empty() && random() % 2 == 0;
    run(mutate ? mutated(random, corpus[below(random, corpus.size())]) : random_bytes(random));
  }
  std::printf("fuzz: %zu corpus inputs and %llu inputs of seed %llu\n", corpus.size(), static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  return 0;
}
