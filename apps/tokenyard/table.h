#pragma once
// Text for the terminal: aligned tables and quantities with units.

#include <cstdint>
#include <string>
#include <vector>

namespace tokenyard::cli {

// The first column is aligned to the left, the others to the right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }
  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

std::string bytes_text(std::int64_t bytes);  // "205.5 MiB"
std::string time_text(double us);            // "12.3 us", "4.56 ms"
std::string count_text(std::int64_t count);  // "131 072"

}  // namespace tokenyard::cli
