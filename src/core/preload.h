#pragma once
// The kernels of this library, for preload_kernels(). A file that defines kernels lists them in one static object:
// const Preloaded preloaded({{kernel_a<true>}, {kernel_b, kAllSharedMemory}});

#include <initializer_list>
#include <vector>

namespace tokenyard::cuda {

struct PreloadedKernel {
  template <class... Args>
  PreloadedKernel(void (*kernel)(Args...), bool wants_all_shared_memory = false)
      : function(reinterpret_cast<const void*>(kernel)), all_shared_memory(wants_all_shared_memory) {}
  const void* function;
  bool all_shared_memory;  // dynamic shared memory up to what a block of the device can have
};
constexpr bool kAllSharedMemory = true;

class Preloaded {
 public:
  Preloaded(std::initializer_list<PreloadedKernel> kernels) : kernels_(kernels), next_(first_) { first_ = this; }
  static const Preloaded* first() { return first_; }
  const Preloaded* next() const { return next_; }
  const std::vector<PreloadedKernel>& kernels() const { return kernels_; }

 private:
  static inline const Preloaded* first_ = nullptr;
  std::vector<PreloadedKernel> kernels_;
  const Preloaded* next_;
};

}  // namespace tokenyard::cuda
