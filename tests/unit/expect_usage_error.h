#pragma once
// An error text is part of the interface: it names the values at fault, what was expected, and a remedy.

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>

#include "tokenyard/error.h"

namespace tokenyard::testing {

// Calls action(), which must throw a UsageError whose text contains every part.
template <class Action>
void expect_usage_error(Action&& action, std::initializer_list<std::string_view> parts) {
  try {
    action();
  } catch (const UsageError& error) {
    const std::string_view text = error.what();
    for (const std::string_view part : parts) EXPECT_NE(text.find(part), text.npos) << "no \"" << part << "\" in: " << text;
    return;
  }
  ADD_FAILURE() << "no UsageError; expected one with \"" << (parts.size() > 0 ? *parts.begin() : "") << "\"";
}

}  // namespace tokenyard::testing
