// Sums of squares in fp64, in an order that neither threads nor the instruction set change: NORM_LANES partial sums
// over a cell, each of every sixteenth element, added up at its end.

struct NormSums {
  double lanes[NORMS - 1][NORM_LANES];
  unsigned largest;  // bits of the largest |b - a| in fp32; NaN outranks Inf

  inline __attribute__((always_inline)) void add(int lane, float a, float b) {
    const double value = a, update = static_cast<double>(b) - value;
    lanes[BASE_SQUARED][lane] += value * value;
    lanes[UPDATE_SQUARED][lane] += update * update;
    lanes[BASE_DOT_UPDATE][lane] += value * update;
    const unsigned size = bits_of(b - a) & 0x7FFFFFFF;
    largest = size > largest ? size : largest;
  }

  void add_values(const float* a, const float* b, int64_t n) {
    for (int64_t i = 0; i < n; i += NORM_LANES)
      for (int l = 0; l < NORM_LANES; ++l) add(l, a[i + l], b[i + l]);
  }

  void finish(double* norms) const {
    for (int s = 0; s < NORMS - 1; ++s) {
      double sum = 0;
      for (int l = 0; l < NORM_LANES; ++l) sum += lanes[s][l];
      norms[s] = sum;
    }
    norms[UPDATE_MAX] = float_of(largest);
  }
};
