#pragma once
// The two ways to refuse: usage_error("...", values) for the caller's fault, TY_ASSERT for our own.

#include <fmt/core.h>

#include "tokenyard/error.h"

namespace tokenyard {

template <class... Values>
[[noreturn]] void usage_error(fmt::format_string<Values...> text, Values&&... values) {
  throw UsageError(fmt::format(text, std::forward<Values>(values)...));
}

[[noreturn]] void assertion_failed(const char* condition, const char* file, int line);

}  // namespace tokenyard

#define TY_ASSERT(condition) \
  do { \
    if (!(condition)) ::tokenyard::assertion_failed(#condition, __FILE__, __LINE__); \
  } while (false)
