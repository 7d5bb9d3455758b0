// Hands out pieces of a worker's scratch, each on a cache line of its own.
//
// A kernel's scratch is a struct whose constructor takes its pieces one after the other. The same constructor tells how
// much it needs, when it is given a Scratch with no memory.
#pragma once

#include "simd.h"

namespace gspn::GSPN_ISA {
namespace {

class Scratch {
 public:
  explicit Scratch(char* memory = nullptr) : memory_(memory) {}
  template <class A>
  A* take(int64_t count) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return reinterpret_cast<A*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// The bytes that a layout with these arguments takes.
template <class Layout, class... Arguments>
size_t scratch_bytes(const Arguments&... arguments) {
  Scratch measure;
  Layout(measure, arguments...);
  return measure.used();
}

}  // namespace
}  // namespace gspn::GSPN_ISA
