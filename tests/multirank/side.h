#pragma once
// Where the tensors of a rank lie while it runs a case. Cases are made and compared on the host; a test of another device brings
// its own side.

#include "multirank/exchange_data.h"
#include "tokenyard/options.h"

namespace tokenyard::exchange_test {

// The host: tensors are used where they are.
class Side {
 public:
  Side() = default;
  Side(const Side&) = delete;
  Side& operator=(const Side&) = delete;
  virtual ~Side() = default;

  virtual bool on_device() const { return false; }
  // What the exchange must know of this side.
  virtual void adapt(ExchangeOptions&) const {}
  virtual void* stream() const { return nullptr; }
  // Memory of this side that holds these bytes, as long as both live.
  virtual void* place(Bytes& bytes) { return bytes.data(); }
  virtual void write(void* to, const Bytes& bytes);
  // The same tensor on the host; `copy` is its memory where it had to be copied.
  virtual ConstTensorView fetch(const ConstTensorView& view, Bytes& copy) const;
};

}  // namespace tokenyard::exchange_test
