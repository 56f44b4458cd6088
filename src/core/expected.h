#pragma once
// Operating failures travel as values inside the library and become TransportError at its edge.

#include <tl/expected.hpp>

#include "tokenyard/error.h"

namespace tokenyard {

template <class T>
using Expected = tl::expected<T, Failure>;

inline tl::unexpected<Failure> unexpected(Failure failure) { return tl::unexpected<Failure>(std::move(failure)); }

template <class T>
T value_or_throw(Expected<T>&& result) {
  if (!result) throw TransportError(std::move(result.error()));
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

}  // namespace tokenyard
