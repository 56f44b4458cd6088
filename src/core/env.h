#pragma once
// The only reader of environment variables.

#include <optional>
#include <string>

namespace tokenyard {

std::optional<std::string> env(const char* name);
// UsageError, naming variable and text, when it is set and not an integer in [low, high].
std::optional<int> env_int(const char* name, int low, int high);

}  // namespace tokenyard
