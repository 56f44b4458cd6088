#include "core/usage.h"

namespace tokenyard {

void assertion_failed(const char* condition, const char* file, int line) {
  throw std::logic_error(fmt::format("{}:{}: broken invariant: {}; this is a bug of tokenyard, please report it", file, line, condition));
}

}  // namespace tokenyard
