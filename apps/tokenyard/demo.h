#pragma once
// The demo: the bytes of a text as tokens, embedded, routed and sent through the experts of an MoE layer.

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tokenyard/dtype.h"

namespace tokenyard::cli {

struct DemoSettings {
  int ranks = 4;
  std::string preset = "qwen3-30b-a3b";
  std::int64_t tokens = 131072;      // bytes of the text that are used, at most
  std::int64_t batch_tokens = 2048;  // per rank and batch
  std::int64_t hidden_size = 64;
  std::int64_t expert_width = 16;
  std::string dtype = "float32";
  int threads = 1;
  std::int64_t seed = 1;
  int timeout_ms = 100'000;
};
nlohmann::json to_json(const DemoSettings& settings);
DemoSettings demo_settings_from_json(const nlohmann::json& settings);

struct DemoText {
  std::string bytes;
  std::string source;  // "README.md", "96 documents and sources of tokenyard"
};
// The file; or without one the documents and sources of this repository, found from the current folder or where the program was built.
// UsageError when there is no text.
DemoText demo_text(const std::string& path, std::int64_t max_bytes);

// {"settings", "text", "preset", "checks", "load", "link_bytes", "phases_us", "timeline", ...}: the whole result, see demo_report.cc.
nlohmann::json demo_report(const DemoSettings& settings, const DemoText& text, const nlohmann::json& ranks, double seconds);
std::string demo_summary(const nlohmann::json& report);  // for the terminal
std::string demo_html(const nlohmann::json& report);     // self-contained

}  // namespace tokenyard::cli
