// Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): ten rounds that turn a counter of four 32-bit words
// and a key of two into four random words.
#pragma once

#include "vector.h"

namespace u2a {
namespace {

// Counters taken at once: the compiler makes vectors of the loops over them.
constexpr int kPhiloxLanes = 16;

inline void philox_product(uint32_t factor, const uint32_t (&x)[kPhiloxLanes], uint32_t (&high)[kPhiloxLanes],
                           uint32_t (&low)[kPhiloxLanes]) {
  for (int l = 0; l < kPhiloxLanes; ++l) high[l] = static_cast<uint32_t>(uint64_t{factor} * x[l] >> 32);
  for (int l = 0; l < kPhiloxLanes; ++l) low[l] = factor * x[l];
}

// words[w][l] = word w at counter (c0, c1 + l, c2, 0) under the key `seed`, low half first.
inline void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t (&words)[4][kPhiloxLanes]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int l = 0; l < kPhiloxLanes; ++l) {
    words[0][l] = c0;
    words[1][l] = c1 + l;
    words[2][l] = c2;
    words[3][l] = 0;
  }
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    uint32_t high0[kPhiloxLanes], low0[kPhiloxLanes], high1[kPhiloxLanes], low1[kPhiloxLanes];
    philox_product(0xD2511F53u, words[0], high0, low0);
    philox_product(0xCD9E8D57u, words[2], high1, low1);
    for (int l = 0; l < kPhiloxLanes; ++l) {
      words[0][l] = high1[l] ^ words[1][l] ^ key0;
      words[1][l] = low1[l];
      words[2][l] = high0[l] ^ words[3][l] ^ key1;
      words[3][l] = low0[l];
    }
  }
}

}  // namespace
}  // namespace u2a
