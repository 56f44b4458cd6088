#pragma once
// Diagnostics on stderr, in one line each. TOKENYARD_LOG sets the level: trace, debug, info, warn (default), error, off.

#include <fmt/core.h>

#include <string_view>

namespace tokenyard {

enum class LogLevel { info, warn };

bool log_enabled(LogLevel level);
void log_line(LogLevel level, std::string_view text);

template <class... Values>
void log_info(fmt::format_string<Values...> text, Values&&... values) {
  if (log_enabled(LogLevel::info)) log_line(LogLevel::info, fmt::format(text, std::forward<Values>(values)...));
}
template <class... Values>
void log_warn(fmt::format_string<Values...> text, Values&&... values) {
  if (log_enabled(LogLevel::warn)) log_line(LogLevel::warn, fmt::format(text, std::forward<Values>(values)...));
}

}  // namespace tokenyard
