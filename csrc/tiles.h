// What kernels on the tile unit share: the registers' shapes and their lifetime.
#pragma once

#include "target.h"

namespace u2a {
namespace {

// The tile registers' shapes (Intel Architecture SDM vol. 1, 18.3): all eight hold 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC does not tell its optimizer that tile loads read memory.
inline void memory_fence() { asm volatile("" ::: "memory"); }

// Holds the tile registers, which only their owner may use: an interrupted thread would have to save 8 KiB.
struct TileScope {
  TileScope() {
    const TileConfig config;
    memory_fence();
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

}  // namespace
}  // namespace u2a
