#pragma once
// Arrays of NumPy, torch and whoever else speaks DLPack, and views of them.

#include <nanobind/ndarray.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bindings.h"
#include "tokenyard/options.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::python {

// An array that came in: keeps it alive, and says what it holds.
class Tensor {
 public:
  // dtype: what the elements mean, when it is not what the array says (uint16 that is bfloat16). UsageError for what has no
  // place in an exchange.
  Tensor(const nb::ndarray<nb::ro>& array, const std::optional<std::string>& dtype);
  // The same of an array that is known by its parts: pointer and element_bytes, shape, strides in elements.
  struct Parts {
    std::uintptr_t data;
    std::int64_t element_bytes;
    nb::tuple shape;
    nb::tuple strides;
  };
  Tensor(nb::object owner, const std::string& dtype, const Parts& parts);
  const ConstTensorView& view() const { return view_; }
  // The array itself may be written, which Tensor does not know.
  TensorView writable() const;

 private:
  void set_shape(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

  nb::ndarray<nb::ro> array_;
  nb::object owner_;
  ConstTensorView view_;
};

enum class Framework { numpy, torch };

// Whose arrays come out, and in which memory.
struct Place {
  Framework framework = Framework::numpy;
  Device device = Device::cpu;
  int device_index = 0;
};

// An array over memory that `owner` keeps alive; None for an absent view. NumPy shows bfloat16 as uint16; fp8 is uint8 in both.
nb::object export_array(const TensorView& view, std::shared_ptr<void> owner, const Place& place);
// The same, read-only where the framework can say so.
nb::object export_array(const ConstTensorView& view, std::shared_ptr<void> owner, const Place& place);

}  // namespace tokenyard::python
