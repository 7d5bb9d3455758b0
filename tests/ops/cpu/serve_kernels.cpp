// Calls the kernels of a library for another process, so that a library for another processor can be tested under an
// emulator that has neither Python nor PyTorch. tests/other_builds.py is the other side.
//
// First it writes the names of the instruction sets, on one line. Then for each call it reads what `Request` says,
// followed by the call's struct and, for each of its pointers that is not null, a `Region` and the memory; it answers
// with the status as int64 and the memory of each region. Both processors have the same layout of structs.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

struct Request {
  char function[32];
  int64_t threads, call_bytes, regions;
};
struct Region {
  int64_t pointer, bytes;  // where in the struct its address belongs
};

// Around each region, with bits that are NaNs: what is read there must not be used, and nothing may be written.
constexpr int64_t kGuard = 128;

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "serve_kernels: %s\n", why);
  std::exit(1);
}

bool read(void* to, int64_t bytes) { return std::fread(to, 1, static_cast<size_t>(bytes), stdin) == static_cast<size_t>(bytes); }
void write(const void* from, int64_t bytes) { std::fwrite(from, 1, static_cast<size_t>(bytes), stdout); }

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) fail(dlerror());
  const auto name = reinterpret_cast<const char* (*)(int64_t)>(dlsym(library, "gspn_instruction_set"));
  for (int64_t i = 0; name(i); ++i) std::printf("%s ", name(i));
  std::printf("\n");
  std::fflush(stdout);

  Request request;
  while (read(&request, sizeof(request))) {
    std::vector<char> call(request.call_bytes);
    if (!read(call.data(), request.call_bytes)) fail("the call is cut off");
    std::vector<std::vector<unsigned char>> memory(request.regions);
    for (auto& one : memory) {
      Region region;
      if (!read(&region, sizeof(region))) fail("a region is cut off");
      one.assign(region.bytes + 2 * kGuard, 0xff);
      unsigned char* data = one.data() + kGuard;
      if (!read(data, region.bytes)) fail("a region's memory is cut off");
      std::memcpy(call.data() + region.pointer, &data, sizeof(data));
    }
    const auto function = reinterpret_cast<int32_t (*)(const void*, int64_t)>(dlsym(library, request.function));
    if (!function) fail(dlerror());
    const int64_t status = function(call.data(), request.threads);
    write(&status, sizeof(status));
    for (const auto& one : memory) {
      for (int64_t i = 0; i < kGuard; ++i) {
        if (one[i] != 0xff || one[one.size() - 1 - i] != 0xff) fail("memory beside a tensor was written to");
      }
      write(one.data() + kGuard, static_cast<int64_t>(one.size()) - 2 * kGuard);
    }
    std::fflush(stdout);
  }
}
