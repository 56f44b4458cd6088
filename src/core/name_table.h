#pragma once
// The spelling of enumerations, in one place per enumeration: a table of {value, text}. A value's first text is its
// name; further ones are accepted when parsing.

#include <algorithm>
#include <string>
#include <string_view>

#include "core/usage.h"

namespace tokenyard {

template <class Enum>
struct NamedValue {
  Enum value;
  std::string_view text;
};

template <class Table, class Enum>
std::string_view name_in(const Table& table, Enum value) {
  const auto* found = std::find_if(std::begin(table), std::end(table), [&](const auto& entry) { return entry.value == value; });
  TY_ASSERT(found != std::end(table));
  return found->text;
}

// `what` is the kind of thing for the error text, e.g. "layout".
template <class Table>
auto parse_in(const Table& table, std::string_view what, std::string_view text) {
  const auto* found = std::find_if(std::begin(table), std::end(table), [&](const auto& entry) { return entry.text == text; });
  if (found != std::end(table)) return found->value;
  std::string known;
  for (const auto& entry : table) known.append(known.empty() ? "" : ", ").append(entry.text);
  usage_error("unknown {} \"{}\"; known: {}", what, text, known);
}

}  // namespace tokenyard
