// The stages that the AVX variants do with byte shuffles and fused arithmetic (scan_bytes.inl), in plain loops.

constexpr int EXPONENT_LINES = 0, DISTANCE_LINES = 0, NORM_LINES = 0;  // see scan_bytes.inl

// Histograms of the base's exponents, of all and of changed elements.
struct Exponents {
  void begin() {}
  void finish(Tally&) {}

  void add_block(const uint8_t* a, const uint64_t* words, int64_t n, unsigned, Ahead&, Tally& tally) {
    // Four tables, so that equal neighbours do not wait for each other's increment.
    uint16_t table[4][2 * EXPONENT_BINS];
    __builtin_memset(table, 0, sizeof table);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t changed = words[i / 64] >> (i % 64) & 1;
      uint16_t code;
      memcpy(&code, a + 2 * i, sizeof code);
      ++table[i % 4][changed << 8 | (code & MAGNITUDE) >> MANTISSA_BITS];
    }
    for (int64_t e = 0; e < EXPONENT_BINS; ++e) {
      int64_t same = 0, changed = 0;
      for (int t = 0; t < 4; ++t) {
        same += table[t][e];
        changed += table[t][EXPONENT_BINS + e];
      }
      tally.exponents[0][e] += same + changed;
      tally.exponents[1][e] += changed;
    }
  }
};

struct Distances {
  void begin() {}
  void finish(Tally&) {}

  Distant add_block(const uint8_t* a, const uint8_t* b, const uint64_t*, int64_t n, const Survey& seen,
                    uint16_t* distances, Ahead&, Tally& tally) {
    const Distant told = write_distances(a, b, n, seen, distances, tally);
    count_reach(distances, n, told.distance, 0, 15, tally);
    return told;
  }
};

// Distances |b - a| > bound in fp32, where no element is NaN.
static int64_t count_apart(const uint8_t* a, const uint8_t* b, int64_t n, float bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint16_t x, y;
    memcpy(&x, a + 2 * i, sizeof x);
    memcpy(&y, b + 2 * i, sizeof y);
    count += float_of(bits_of(bf16_to_fp32(y) - bf16_to_fp32(x)) & 0x7FFFFFFF) > bound;
  }
  return count;
}

constexpr bool NORMS_ASK_DISTANCES = false;

// Sums of bf16 codes: even elements of each sixteen in the first eight lanes, odd ones in the others.
static void add_code_norms(const uint8_t* a, const uint8_t* b, int64_t n, bool, Ahead&, NormSums& sums) {
  for (int64_t i = 0; i < n; i += NORM_LANES) {
    uint16_t x_codes[NORM_LANES], y_codes[NORM_LANES];
    memcpy(x_codes, a + 2 * i, sizeof x_codes);
    memcpy(y_codes, b + 2 * i, sizeof y_codes);
    for (int l = 0; l < NORM_LANES; ++l) {
      const int element = l % 8 * 2 + l / 8;
      sums.add(l, bf16_to_fp32(x_codes[element]), bf16_to_fp32(y_codes[element]));
    }
  }
}
