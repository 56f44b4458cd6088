#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <filesystem>

#include "core/usage.h"
#include "demo.h"
#include "files.h"
#include "revision.h"

namespace tokenyard::cli {
namespace {

namespace fs = std::filesystem;

bool is_checkout(const fs::path& folder) {
  std::error_code ignored;
  return fs::exists(folder / "include/tokenyard/tokenyard.h", ignored);
}

// The checkout around the current folder, or else the one this program was built from.
fs::path find_checkout() {
  std::error_code ignored;
  for (fs::path folder = fs::current_path(ignored); !folder.empty(); folder = folder.parent_path()) {
    if (is_checkout(folder)) return folder;
    if (folder == folder.parent_path()) break;
  }
  return is_checkout(kSourceDir) ? fs::path(kSourceDir) : fs::path();
}

bool is_text(const fs::path& path) {
  constexpr std::array<const char*, 5> kEndings = {".md", ".h", ".cc", ".py", ".sh"};
  return std::any_of(kEndings.begin(), kEndings.end(), [&](const char* ending) { return path.extension() == ending; });
}

// Documents first, then sources, each sorted: the same text everywhere.
std::vector<fs::path> texts_of(const fs::path& checkout) {
  std::vector<fs::path> documents, sources;
  const auto add = [&](const fs::path& path) {
    if (is_text(path)) (path.extension() == ".md" ? documents : sources).push_back(path);
  };
  for (const auto& entry : fs::directory_iterator(checkout)) {
    if (entry.is_regular_file()) add(entry.path());
  }
  for (const char* folder : {"docs", "include", "src", "apps", "tests", "examples"}) {
    std::error_code absent;
    for (const auto& entry : fs::recursive_directory_iterator(checkout / folder, absent)) {
      if (entry.is_regular_file()) add(entry.path());
    }
  }
  std::sort(documents.begin(), documents.end());
  std::sort(sources.begin(), sources.end());
  documents.insert(documents.end(), sources.begin(), sources.end());
  return documents;
}

}  // namespace

DemoText demo_text(const std::string& path, std::int64_t max_bytes) {
  DemoText text;
  if (!path.empty()) {
    text = {read_file("--text", path), path};
    if (text.bytes.empty()) usage_error("--text {}: is empty; name a file with text", path);
  } else {
    const fs::path checkout = find_checkout();
    if (checkout.empty()) {
      usage_error("no text: the current folder is no checkout of tokenyard, and {} is none any more; name a file with --text", kSourceDir);
    }
    int files = 0;
    for (const fs::path& file : texts_of(checkout)) {
      if (std::ssize(text.bytes) >= max_bytes) break;
      text.bytes += read_file("--text", file.string());
      ++files;
    }
    text.source = fmt::format("{} documents and sources of tokenyard's repository", files);
  }
  if (std::ssize(text.bytes) > max_bytes) text.bytes.resize(static_cast<std::size_t>(max_bytes));
  return text;
}

}  // namespace tokenyard::cli
