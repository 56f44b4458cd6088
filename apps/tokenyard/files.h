#pragma once
// Files that a command reads and writes. `option` is the name that error texts give, e.g. "--json".

#include <string>

namespace tokenyard::cli {

// UsageError when it cannot be read.
std::string read_file(const std::string& option, const std::string& path);
// UsageError when `path` could not be written later: called before any work is done. Changes nothing.
void require_writable(const std::string& option, const std::string& path);
// Error (operating failure) when the disk refuses.
void write_file(const std::string& path, const std::string& text);
// The same, and says so on standard output; nothing where `path` is empty.
void write_result(const std::string& path, const std::string& text);

}  // namespace tokenyard::cli
