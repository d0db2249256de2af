// What does not depend on an instruction set: memory, and the choice of the set.
#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace u2a {

namespace {

// Released buffers of one thread, the last released last. Fresh memory from the system costs a page fault every 4 KiB,
// which for the panels of one call can be as much time as their product.
class Released {
 public:
  ~Released() {
    while (!blocks_.empty()) forget_first();
  }

  // The smallest block that holds `bytes` and not many more, or nothing.
  void* take(size_t* bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->bytes >= *bytes && block->bytes / kSlack <= *bytes &&
          (best == blocks_.end() || block->bytes < best->bytes))
        best = block;
    if (best == blocks_.end()) return nullptr;
    void* const data = best->data;
    *bytes = best->bytes;
    kept_ -= best->bytes;
    blocks_.erase(best);
    return data;
  }

  // Keeps the block and gives those back to the system that were not used for longest, as far as it takes.
  void put(void* data, size_t bytes) {
    if (bytes < kLeastBytes || bytes > kMostBytes) return std::free(data);
    while (kept_ + bytes > kMostBytes) forget_first();
    blocks_.push_back({data, bytes});
    kept_ += bytes;
  }

 private:
  // The C library keeps smaller ones itself.
  static constexpr size_t kLeastBytes = 64 << 10, kMostBytes = 64 << 20, kSlack = 4;
  struct Block {
    void* data;
    size_t bytes;
  };
  void forget_first() {
    std::free(blocks_.front().data);
    kept_ -= blocks_.front().bytes;
    blocks_.erase(blocks_.begin());
  }
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

thread_local Released released;

}  // namespace

Buffer::Buffer(size_t bytes) : data_(nullptr), bytes_(bytes ? bytes : 64) {
  data_ = released.take(&bytes_);
  if (!data_ && posix_memalign(&data_, 64, bytes_) != 0) throw std::bad_alloc();
}

Buffer::~Buffer() { released.put(data_, bytes_); }

#if defined(__x86_64__)
namespace {

// Linux gives a process the tile registers only when it asks (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Not every compiler's __builtin_cpu_supports knows these names (Intel's manual, volume 2A, CPUID leaf 7).
bool has_tiles() {
  constexpr unsigned kAmxBf16Bit = 1u << 22, kAmxTileBit = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16Bit) && (d & kAmxTileBit);
}

const Kernels& best_vectors() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
  return kPortable;
}

bool has_bf16_pairs() { return &best_vectors() == &kAvx512 && __builtin_cpu_supports("avx512bf16"); }

bool has_bf16_tiles() {
  static const bool has = has_bf16_pairs() && has_tiles() && may_use_tiles();
  return has;
}

const Kernels& best_bf16() {
  if (has_bf16_tiles()) return kAmxBf16;
  return has_bf16_pairs() ? kAvx512Bf16 : best_vectors();
}

Kernels best_float32() {
  Kernels kernels = best_vectors();
  if (has_bf16_tiles()) {
    kernels.ghost_dot = ghost_dot_on_tiles;
    kernels.linear_logprob = linear_logprob_on_tiles;
  }
  return kernels;
}

}  // namespace

const Kernels& kernels_for(DType dtype) {
  static const Kernels& vectors = best_vectors();
  static const Kernels& bf16 = best_bf16();
  static const Kernels float32 = best_float32();
  return dtype == DType::kBFloat16 ? bf16 : dtype == DType::kFloat32 ? float32 : vectors;
}
#else
const Kernels& kernels_for(DType) { return kPortable; }
#endif

}  // namespace u2a
