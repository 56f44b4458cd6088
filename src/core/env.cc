#include "core/env.h"

#include <charconv>
#include <cstdlib>

#include "core/usage.h"

namespace tokenyard {

std::optional<std::string> env(const char* name) {
  const char* text = std::getenv(name);
  return text ? std::optional<std::string>(text) : std::nullopt;
}

std::optional<int> env_int(const char* name, int low, int high) {
  const std::optional<std::string> text = env(name);
  if (!text) return std::nullopt;
  int value = 0;
  const char* end = text->data() + text->size();
  const auto [stopped, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || stopped != end || value < low || value > high) {
    usage_error("environment variable {}=\"{}\": expected an integer from {} to {}; set it to one, or unset it", name, *text, low, high);
  }
  return value;
}

}  // namespace tokenyard
