// Keys, their histogram and their bits, written once over the vector layer. Included inside the namespace of an
// instruction set, behind namespace offprin's numerics.h.

constexpr int64_t FLOATS = static_cast<int64_t>(sizeof(Floats) / sizeof(float));
constexpr int64_t PANEL = 2 * FLOATS;
static_assert(64 % PANEL == 0 && PRODUCT_ROWS <= WIDEST_TILE, "tiles and panels fit together");

// One panel of one tile. Every sum is one chain of fused multiply-adds in the order of the factors, so that its bits
// depend neither on tiles and threads nor on the instruction set.
static void product_panel(const float* const* rows, int64_t step, const float* panel, int64_t rank, uint32_t* keys,
                          int64_t stride) {
  Floats sum[PRODUCT_ROWS][2];
  const float* row[PRODUCT_ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < PRODUCT_ROWS; ++r) {
    sum[r][0] = sum[r][1] = zero_floats();
    row[r] = rows[r];
  }
  for (int64_t i = 0, at = 0; i < rank; ++i, at += step) {
    const Floats low = load_floats(panel + i * PANEL), high = load_floats(panel + i * PANEL + FLOATS);
#pragma GCC unroll 8
    for (int r = 0; r < PRODUCT_ROWS; ++r) {
      const Floats factor = splat_float(row[r][at]);
      sum[r][0] = fused_floats(factor, low, sum[r][0]);
      sum[r][1] = fused_floats(factor, high, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < PRODUCT_ROWS; ++r) {
    store_largest_first(keys + r * stride, sum[r][0]);
    store_largest_first(keys + r * stride + FLOATS, sum[r][1]);
  }
}

static void product(const float* const* rows, int64_t step, const float* panels, int64_t rank, int64_t columns,
                    uint32_t* keys, int64_t stride) {
  for (int64_t column = 0; column < columns; column += PANEL)
    product_panel(rows, step, panels + column * rank, rank, keys + column, stride);
}

static void weights(const void* weight, int32_t dtype, int64_t n, uint32_t* keys) {
  if (dtype == FP32) {
    const uint32_t* bits = static_cast<const uint32_t*>(weight);
    for (int64_t i = 0; i < n; ++i) keys[i] = bits[i] & 0x7FFFFFFF;
  } else {
    const uint16_t* codes = static_cast<const uint16_t*>(weight);
    for (int64_t i = 0; i < n; ++i) keys[i] = codes[i] & MAGNITUDE;
  }
}

static void hashes(uint64_t stream, uint64_t index, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = static_cast<uint32_t>(splitmix64(stream, index + static_cast<uint64_t>(i)) >> 32);
  }
}

static void histogram(const uint32_t* keys, int64_t n, uint32_t first, uint32_t last, int shift, uint32_t* bins) {
  // Everything is counted on the first pass, by far the longest: no comparisons then.
  if (first == 0 && last == 0xFFFFFFFF) {
    for (int64_t i = 0; i < n; ++i) ++bins[keys[i] >> shift];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t offset = keys[i] - first;
    if (offset <= last - first) ++bins[offset >> shift];
  }
}

// The lowest `n` bits, for any n.
OFFPRIN_INLINE uint64_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

static Marked mark(const uint32_t* keys, int64_t n, int64_t flat, const Cut& cut, uint64_t* words,
                   uint64_t* candidates) {
  Marked found{0, 0};
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t present = low_bits(n - i), known = low_bits(cut.known - flat - i);
    const uint64_t below = cut.first != 0 ? up_to(keys + i, cut.first - 1) & present : 0;
    const uint64_t inside = up_to(keys + i, cut.last) & present & ~below;
    const uint64_t word = below | (inside & known);
    words[i / 64] = word;
    found.set += __builtin_popcountll(word);
    for (uint64_t left = inside & ~known & low_bits(cut.open - flat - i); left != 0; left &= left - 1) {
      const int64_t at = i + __builtin_ctzll(left);
      candidates[found.candidates++] = static_cast<uint64_t>(keys[at] - cut.first) << 48 | static_cast<uint64_t>(flat + at);
    }
  }
  return found;
}

extern const SelectKernels select_kernels = {PRODUCT_ROWS, PANEL, product, weights, hashes, histogram, mark};
