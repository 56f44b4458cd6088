#include "core/interrupt.h"

#include <utility>

namespace tokenyard {
namespace {

thread_local bool (*check_of_thread)() = nullptr;

}  // namespace

InterruptScope::InterruptScope(bool (*check)()) : before_(std::exchange(check_of_thread, check)) {}
InterruptScope::~InterruptScope() { check_of_thread = before_; }

bool is_interruptible() { return check_of_thread != nullptr; }
bool interrupted() { return check_of_thread != nullptr && check_of_thread(); }

}  // namespace tokenyard
