#pragma once
// One measurement, as `bench` and `bench sweep` make it.

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "settings.h"

namespace tokenyard::cli {

// Runs the ranks; settings are complete. The result is a bench_report.
nlohmann::json measure(const Settings& settings, const std::string& label);

}  // namespace tokenyard::cli
