#include "core/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include "core/env.h"
#include "core/name_table.h"

namespace tokenyard {
namespace {

using spdlog::level::level_enum;

constexpr NamedValue<level_enum> kLevels[] = {
    {level_enum::trace, "trace"}, {level_enum::debug, "debug"}, {level_enum::info, "info"},
    {level_enum::warn, "warn"},   {level_enum::err, "error"},   {level_enum::off, "off"},
};

// Not in spdlog's registry: an application's own spdlog set-up and ours leave each other alone.
spdlog::logger& logger() {
  static spdlog::logger instance = [] {
    spdlog::logger made("tokenyard", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made.set_pattern("[%H:%M:%S.%e] [%P] [tokenyard] [%l] %v");
    made.set_level(parse_in(kLevels, "level in TOKENYARD_LOG", env("TOKENYARD_LOG").value_or("warn")));
    return made;
  }();
  return instance;
}

level_enum to_spdlog(LogLevel level) { return level == LogLevel::info ? level_enum::info : level_enum::warn; }

}  // namespace

bool log_enabled(LogLevel level) { return logger().should_log(to_spdlog(level)); }
void log_line(LogLevel level, std::string_view text) { logger().log(to_spdlog(level), "{}", text); }

}  // namespace tokenyard
